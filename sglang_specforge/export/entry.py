"""One forward pass's captured states on their way through the host ring.

Shapes: B requests of the pass, P of them captured, N rows, R rows a captured request, D drafted tokens a request, H
hidden; F = 2 + D, and R more of a tree.
Prefill rows are the tokens of the pass in order (``contracts.spans`` says what one below zero is); verify rows are, for
each captured request, the R nodes of the longest accepted path, of which the first were accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_specforge.contracts.coding import SCALE_BYTES
from sglang_specforge.contracts.spans import Captured, Span, TensorLayout
from sglang_specforge.export.admission import ServedRequest
from sglang_specforge.export.ring import HostRing, Region


class Prefilled(NamedTuple):
    """What a prefill pass computed of a captured request."""

    start: int  # first position of the pass
    length: int  # tokens of the pass
    prefix: Sequence[int] = ()  # of the request's first pass: tokens that were cached, and are not computed
    places: bytes = b""  # its part of ``Captured.places``


@dataclass(frozen=True, slots=True)
class Verified:
    """What the verification decided, of all requests of the pass."""

    batch_size: int
    rows_per_request: int
    chain: bool  # or a tree
    # int64: position of the request's first row, rows accepted, its D drafted tokens (a chain's R rows are of these)
    # and, of a tree, those of its R rows. None where nothing was drafted and nothing is captured.
    facts_BF: Tensor | None
    picked: Sequence[int]  # the captured requests
    counted: Sequence[int]  # those whose acceptance counts
    slices: Sequence[str]  # of each counted request
    prompts: Sequence[int]  # likewise: tokens of its prompt
    window: int = 0  # of an A/B; 0: none
    standings: Sequence[int] = ()  # in a window, each counted request's ``acceptance.Standing``
    seconds: float | None = None  # of the pass, where ``pace.Pace`` could tell

    @property
    def drafted(self) -> bool:
        """Whether anything was proposed: with drafting off, a request's one row is its last token."""
        return self.rows_per_request > 1

    def committed(self) -> list[int]:
        """Tokens that were committed for each counted request."""
        if self.facts_BF is None:
            return [1] * len(self.counted)
        accepted_B = self._facts_BF[:, 1].tolist()
        return [accepted_B[b] for b in self.counted]

    def facts(self) -> list[tuple[int, int, int, int]]:
        """Of each captured request: first position, rows accepted, the token proposed after the first row, and the one
        refused after the last accepted row. In a chain that is the next draft; a tree may have refused several (-1)."""
        facts_PF = self._facts_BF[self.picked]
        none_P = np.full(len(facts_PF), -1)
        accepted_P, drafted_PD = facts_PF[:, 1], facts_PF[:, 2:]
        proposed_P, rejected_P = drafted_PD[:, 1] if self.drafted else none_P, none_P
        if self.chain:
            rejected_P = np.column_stack((drafted_PD, none_P))[np.arange(len(facts_PF)), accepted_P]
        numbers = (facts_PF[:, 0], accepted_P, proposed_P, rejected_P)
        return list(zip(*(n.tolist() for n in numbers), strict=True))

    def tokens_N(self) -> Tensor:
        """Of the captured requests' rows."""
        return torch.from_numpy(self._facts_BF[self.picked, -self.rows_per_request :].reshape(-1))

    @property
    def _facts_BF(self) -> np.ndarray:
        """Where they are looked at: torch would let the GIL go with each operation, and have to get it back."""
        return self.facts_BF.numpy()


@dataclass(slots=True)
class Entry:
    """Device tensors copied (or on their way) to host memory; without ``requests``, a pass that is only counted."""

    requests: Sequence[ServedRequest]
    draft_version: int
    region: Region | None = None
    states: list[tuple[str, Tensor]] = field(default_factory=list)  # name, host tensor [rows, width] in the region
    prompt_tokens_N: Tensor | None = None  # int64, host: of a prefill pass
    prefilled: Sequence[Prefilled] = ()
    verified: Verified | None = None
    copied: "torch.cuda.Event | None" = None

    def wait(self) -> None:
        """Block (the exporter thread) until the copies have landed."""
        if self.copied is not None:
            self.copied.synchronize()

    def spans(self) -> list[Span]:
        return self._verify_spans() if self.verified else self._prefill_spans()

    def message(self, stream: str, sent_before: int, spans: list[Span]) -> tuple[Captured, list[Tensor]]:
        """Header and the tensors whose memory follows it."""
        tokens_N = self.verified.tokens_N() if self.verified else self.prompt_tokens_N
        tensors = [*self.states, ("tokens_N", tokens_N)]
        layouts = [_layout(name, tensor) for name, tensor in tensors]
        places = b"".join(prefilled.places for prefilled in self.prefilled)
        return Captured(stream, sent_before, self.draft_version, spans, layouts, places), [t for _, t in tensors]

    def _prefill_spans(self) -> list[Span]:
        spans, row = [], 0
        for r, (start, length, cached, _) in zip(self.requests, self.prefilled, strict=True):
            if length:
                spans.append(
                    Span(
                        r.alias, start, length, row, r.prompt_tokens, r.cached_tokens, prefix=_tokens(cached),
                        slice=r.slice,
                    )
                )  # fmt: skip
            row += length
        return spans

    def _verify_spans(self) -> list[Span]:
        R, facts = self.verified.rows_per_request, self.verified.facts()
        return [
            Span(
                r.alias, start, length, b * R, r.prompt_tokens, r.cached_tokens, proposed, rejected,
                _tokens(r.prompt) if start == r.prompt_tokens else b"", r.slice,
            )
            for b, (r, (start, length, proposed, rejected)) in enumerate(zip(self.requests, facts, strict=True))
        ]  # fmt: skip


def _layout(name: str, tensor: Tensor) -> TensorLayout:
    if tensor.dtype == torch.uint8:
        rows, width = tensor.shape
        return TensorLayout(name, "float8", [rows, width - SCALE_BYTES])
    return TensorLayout(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))


def _tokens(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int64).tobytes() if len(ids) else b""


class HostCopier:
    """Copies device tensors to the host without waiting: on CUDA, on a side stream into pinned memory."""

    def __init__(self, ring: HostRing, device: torch.device) -> None:
        self._ring = ring
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self,
        requests: Sequence[ServedRequest],
        draft_version: int,
        states: dict[str, Tensor],
        *,
        prompt_tokens_N: Tensor | None = None,
        prefilled: Sequence[Prefilled] = (),
        verified: Verified | None = None,
    ) -> Entry:
        """Start copying a pass; the sources may be overwritten by later work of the current stream.

        Raises:
            RuntimeError: the ring has no room; ``Admission.pick`` sees to it that there is.
        """
        entry = Entry(requests, draft_version, prefilled=prefilled, verified=verified)
        if requests:
            entry.region = self._ring.reserve(sum(t.nbytes for t in states.values()))
            if entry.region is None:
                raise RuntimeError("the ring has no room for a pass that was admitted")
        small = {"prompt_tokens_N": prompt_tokens_N, "facts_BF": verified and verified.facts_BF}
        small = {name: tensor for name, tensor in small.items() if tensor is not None}
        if not (states or small):
            return entry
        if self._stream is None:
            _fill(entry, states, small, non_blocking=False)
            return entry
        # Graph outputs are overwritten by the next replay. A clone in device memory costs the compute stream next to
        # nothing; the slow way to the host is the side stream's, which nothing waits for.
        states, small = ({name: t.clone() for name, t in group.items()} for group in (states, small))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _fill(entry, states, small, non_blocking=True)
            for tensor in [*states.values(), *small.values()]:
                tensor.record_stream(self._stream)
            entry.copied = torch.cuda.Event(blocking=True)  # or the exporter's thread would wait on a core of its own
            entry.copied.record(self._stream)
        return entry


def _fill(entry: Entry, states: dict[str, Tensor], small: dict[str, Tensor], non_blocking: bool) -> None:
    """Copy the states into the entry's region, and what is small into memory of its own."""
    offset = 0
    for name, source in states.items():
        host = entry.region.bytes[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
        host.copy_(source, non_blocking=non_blocking)
        entry.states.append((name, host))
        offset += source.nbytes
    if "prompt_tokens_N" in small:
        entry.prompt_tokens_N = _to_host(small["prompt_tokens_N"], non_blocking)
    if "facts_BF" in small:
        entry.verified = replace(entry.verified, facts_BF=_to_host(small["facts_BF"], non_blocking))


def _to_host(source: Tensor, non_blocking: bool) -> Tensor:
    host = torch.empty(source.shape, dtype=torch.int64, pin_memory=non_blocking)
    return host.copy_(source, non_blocking=non_blocking)
