"""One forward pass's captured states on their way through the host ring.

Shapes: B requests, N rows, R rows a request, H hidden. Prefill rows are the tokens of the pass in order; verify
rows are, for each request, the R nodes of the longest accepted path, of which ``accept_lens`` were accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sglang_specforge.contracts.spans import Captured, Span, TensorLayout
from sglang_specforge.export.ring import HostRing, Region


@dataclass(frozen=True, slots=True)
class CapturedRequest:
    """What the scheduler knows of a request at capture, copied so that it can move on."""

    rid: str
    prompt_tokens: int
    cached_tokens: int
    start: int = 0  # prefill: first position of the pass
    length: int = 0  # prefill: tokens of the pass
    prefix: Sequence[int] = ()  # of the request's first pass: tokens that were cached, and are not computed
    slice: str = ""  # its label


@dataclass(slots=True)
class Entry:
    """Device tensors copied (or on their way) to host memory; ``region`` is None where the ring was full."""

    requests: Sequence[CapturedRequest]
    draft_version: int
    region: Region | None
    states: list[tuple[str, Tensor]] = field(default_factory=list)  # name, host tensor [N, width] in the region
    tokens_N: Tensor | None = None  # int64, host
    verify: "VerifyMeta | None" = None
    copied: "torch.cuda.Event | None" = None

    def wait(self) -> None:
        """Block (the exporter thread) until the copies have landed."""
        if self.copied is not None:
            self.copied.synchronize()

    def spans(self) -> list[Span]:
        return self._verify_spans() if self.verify else self._prefill_spans()

    def message(self, stream: str, sent_before: int, spans: list[Span]) -> tuple[Captured, list[Tensor]]:
        """Header and the tensors whose memory follows it."""
        tensors = [*self.states, ("tokens_N", self.tokens_N)]
        layouts = [TensorLayout(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors]
        return Captured(stream, sent_before, self.draft_version, spans, layouts), [t for _, t in tensors]

    def _prefill_spans(self) -> list[Span]:
        spans, row = [], 0
        for r in self.requests:
            if r.length:
                prefix = np.asarray(r.prefix, np.int32).tobytes()
                spans.append(
                    Span(r.rid, r.start, r.length, row, r.prompt_tokens, r.cached_tokens, prefix=prefix, slice=r.slice)
                )
            row += r.length
        return spans

    def _verify_spans(self) -> list[Span]:
        R = self.verify.rows_per_request
        facts = zip(*self.verify.facts_4B.tolist(), strict=True)
        return [
            Span(r.rid, start, length, b * R, r.prompt_tokens, r.cached_tokens, proposed, rejected, slice=r.slice)
            for b, (r, (start, length, proposed, rejected)) in enumerate(zip(self.requests, facts, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class VerifyMeta:
    """What the verification decided. ``facts_4B`` (int64) holds, for each request, the position of its first row, the
    accepted rows, the token proposed after the first row, and the one refused after the last accepted row (or -1)."""

    rows_per_request: int
    facts_4B: Tensor


class HostCopier:
    """Copies device tensors to the host without waiting: on CUDA, on a side stream into pinned memory."""

    def __init__(self, ring: HostRing, device: torch.device) -> None:
        self._ring = ring
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self,
        requests: Sequence[CapturedRequest],
        draft_version: int,
        states: dict[str, Tensor],
        tokens_N: Tensor,
        verify: VerifyMeta | None = None,
    ) -> Entry:
        """Start copying a pass; the sources may be overwritten by later work of the current stream."""
        region = self._ring.reserve(sum(t.nbytes for t in states.values()))
        entry = Entry(requests, draft_version, region)
        if self._stream is None:
            self._fill(entry, states, tokens_N, verify, non_blocking=False)
            return entry
        # Graph outputs are overwritten by the next replay. A clone in device memory costs the compute stream next to
        # nothing; the slow way to the host is the side stream's, which nothing waits for.
        states, tokens_N, verify = _clone(states, tokens_N, verify)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._fill(entry, states, tokens_N, verify, non_blocking=True)
            for tensor in _tensors(states, tokens_N, verify):
                tensor.record_stream(self._stream)
            entry.copied = torch.cuda.Event()
            entry.copied.record(self._stream)
        return entry

    def _fill(
        self, entry: Entry, states: dict[str, Tensor], tokens_N: Tensor, verify: VerifyMeta | None, non_blocking: bool
    ) -> None:
        if entry.region is not None:
            offset = 0
            for name, source in states.items():
                host = entry.region.bytes[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
                host.copy_(source, non_blocking=non_blocking)
                entry.states.append((name, host))
                offset += source.nbytes
        entry.tokens_N = _to_host(tokens_N, non_blocking)
        if verify is not None:
            entry.verify = VerifyMeta(verify.rows_per_request, _to_host(verify.facts_4B, non_blocking))


def _tensors(states: dict[str, Tensor], tokens_N: Tensor, verify: VerifyMeta | None) -> list[Tensor]:
    return [*states.values(), tokens_N, *([verify.facts_4B] if verify else [])]


def _clone(
    states: dict[str, Tensor], tokens_N: Tensor, verify: VerifyMeta | None
) -> tuple[dict[str, Tensor], Tensor, VerifyMeta | None]:
    if verify is not None:
        verify = VerifyMeta(verify.rows_per_request, verify.facts_4B.clone())
    return {name: t.clone() for name, t in states.items()}, tokens_N.clone(), verify


def _to_host(source: Tensor, non_blocking: bool) -> Tensor:
    host = torch.empty(source.shape, dtype=torch.int64, pin_memory=non_blocking)
    return host.copy_(source, non_blocking=non_blocking)
