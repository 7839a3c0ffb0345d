"""Spans into samples: one request's positions in order, repeats resolved, everything left out counted.

What the server had cached of a request is put back from the prefix store, and what comes is kept there. So are the
prompts that a prefill server computed; the decode server's samples are completed by them.

A retracted request sends positions again: the newest wins. Positions beyond the request's end were computed
but are no part of it. A hole (spans dropped on the server, or left out here as their states are not finite) ends a
sample.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Finished, Message, Span
from trainer.gathered import Arrived, ChunkPool, Gathered
from trainer.prefix_store import PrefixStore
from trainer.rows import Rows
from trainer.sample import Sample, fields_of

logger = logging.getLogger(__name__)

_REMEMBERED_ENDS = 4096
_MIN_TOKENS = 2  # a row needs the token after it


class _Piece(NamedTuple):
    span: Span
    version: int  # of the draft
    place: int  # of its first row among those gathered


class _Open:
    """A request whose end is not known yet."""

    def __init__(self, first: Span, pool: ChunkPool) -> None:
        self.prompt_tokens, self.slice = first.prompt_tokens, first.slice
        # Tokens from position 0 on, as far as they are known from prefill; None where they are not.
        self.head_T: Tensor | None = None
        if first.prefix or not first.start:
            self.head_T = torch.from_numpy(np.frombuffer(first.prefix, np.int64).copy())
        self.gathered = Gathered(pool)
        self.pieces: list[_Piece] = []
        self.tokens = 0
        self.touched_s = time.monotonic()

    def extend_head(self, span: Span, tokens_T: Tensor) -> bool:
        """Whether the span goes on with the prompt where it is known to."""
        if self.head_T is None or span.start != len(self.head_T):
            return False
        self.head_T = torch.cat([self.head_T, tokens_T])
        return True


class Assembler:
    """Holds open requests; hands out samples as requests finish.

    Args:
        dtype: of the samples' states (None: as they come).
        prompts_only: the server computes nothing else, and another the answers: its requests are kept as prefixes.
    """

    def __init__(
        self,
        ledger: TokenLedger,
        max_sample_tokens: int,
        prefixes: PrefixStore | None = None,
        max_open_tokens: int = 1 << 20,
        abandoned_after_s: float = 600.0,
        dtype: torch.dtype | None = None,
        prompts_only: bool = False,
    ) -> None:
        self._dtype, self._prompts_only = dtype, prompts_only
        self._ledger, self._max_tokens, self._abandoned_after_s = ledger, max_sample_tokens, abandoned_after_s
        self._max_open_tokens = max_open_tokens
        self._prefixes = prefixes or PrefixStore("", 0)
        self._pool = ChunkPool()
        self._open: dict[tuple[str, str], _Open] = {}
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.open_tokens = 0

    def add(
        self, message: Message, tensors: dict[str, Tensor], are_intact: Callable[[], bool] = lambda: True
    ) -> list[Sample]:
        """Take in a message; returns the samples that it completes.

        ``are_intact`` is asked once the tensors have been read, where someone else may write to their memory.
        """
        if isinstance(message, Finished):
            return self._finish(message)
        arrived, begun = Arrived(tensors), {}
        copied: list[tuple[_Open | None, int]] = []
        for span in message.spans:
            key = (message.stream, span.rid)
            if key in self._ended:
                copied.append((None, 0))
                continue
            if (request := self._open.get(key) or begun.get(key)) is None:
                request = begun[key] = _Open(span, self._pool)
            copied.append((request, request.gathered.add(arrived, span.row, span.length)))
        if are_intact():
            self._open |= begun
            self._take(message, copied)
        else:
            self._ledger.drop("overwritten", message.tokens)
        return []

    def expire(self) -> None:
        """Drop requests not heard of for long: their end was lost."""
        limit_s = time.monotonic() - self._abandoned_after_s
        for key in [key for key, request in self._open.items() if request.touched_s < limit_s]:
            self._give_up(key, "abandoned")

    def _take(self, message: Captured, copied: list[tuple[_Open | None, int]]) -> None:
        """The message's spans, whose rows were copied: each one's request, but for one that has ended, and place."""
        now_s = time.monotonic()
        for span, (request, place) in zip(message.spans, copied, strict=True):
            if request is None:
                self._ledger.drop("past_finish", span.length)
                continue
            request.touched_s = now_s
            if span.start < request.prompt_tokens and not self._keep_prompt(request, span, place):
                continue
            request.pieces.append(_Piece(span, message.draft_version, place))
            request.tokens += span.length
            self.open_tokens += span.length
        while self.open_tokens > self._max_open_tokens:
            self._give_up(min(self._open, key=lambda key: self._open[key].touched_s), "too_many_open")

    def _keep_prompt(self, request: _Open, span: Span, place: int) -> bool:
        """Of what a prefill computed, whether it is finite: others may find it cached from now on, and end before this
        request does."""
        rows = request.gathered.rows(place, place + span.length, self._dtype)
        if not rows.are_finite():
            self._drop_not_finite(span.length)
            return False
        if request.extend_head(span, rows.tokens_N):
            self._prefixes.put(request.head_T, span.start, rows)
        return True

    def _finish(self, message: Finished) -> list[Sample]:
        key = (message.stream, message.rid)
        if key not in self._open:
            return []
        if message.cut_short or self._prompts_only:
            self._give_up(key, "cut_short" if message.cut_short else "kept_as_prefix")
            return []
        request = self._close(key)
        sample = self._assemble(message.rid, request, message.total_tokens) if request.pieces else None
        request.gathered.let_go()
        return [sample] if sample else []

    def _give_up(self, key: tuple[str, str], reason: str) -> None:
        request = self._close(key)
        self._ledger.drop(reason, request.tokens)
        request.gathered.let_go()

    def _close(self, key: tuple[str, str]) -> _Open:
        """Take an open request out; what still comes of it is past its end."""
        request = self._open.pop(key)
        self.open_tokens -= request.tokens
        self._ended[key] = None
        if len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        return request

    def _assemble(self, rid: str, request: _Open, total_tokens: int) -> Sample | None:
        start, piece_T, place_T = self._laid_out(request)
        kept = self._leave_out("past_finish", piece_T, max(0, total_tokens - start))
        holes = np.flatnonzero(piece_T[:kept] < 0)
        kept = self._leave_out("gap", piece_T[:kept], int(holes[0]) if len(holes) else kept)
        kept = self._leave_out("too_long", piece_T[:kept], min(kept, self._max_tokens))
        rows = request.gathered.pick(place_T[:kept], self._dtype) if kept else None
        if rows is not None and not rows.are_finite():
            kept = self._leave_out_not_finite(rows)
            rows = rows.pick(slice(kept))
        if kept < _MIN_TOKENS:
            self._leave_out("too_short", piece_T[:kept], 0)
            return None
        pieces = [request.pieces[i] for i in np.unique(piece_T[:kept]).tolist()]
        versions = {piece.version for piece in request.pieces}
        rejected_T, next_T = np.full(kept, -1), start + 1 + torch.arange(kept)
        for span, _, _ in pieces:
            if (last := span.start - start + span.length - 1) < kept:
                rejected_T[last] = span.rejected
        # Steps that drafted nothing may not have kept the draft's keys: what it proposes later cannot be told here.
        undrafted = (s.start for s, _, _ in pieces if s.proposed < 0 and s.start >= request.prompt_tokens)
        told = min(undrafted, default=start + kept)
        sample = Sample(
            rid=rid,
            start=start,
            **fields_of(rows),
            generated_T=(next_T >= request.prompt_tokens) & (next_T < total_tokens),
            rejected_T=torch.from_numpy(rejected_T),
            slice=request.slice,
            draft_version=versions.pop() if len(versions) == 1 else None,
            proposals=[(s.start, s.proposed) for s, _, _ in pieces if s.proposed >= 0 and s.start < told],
        )
        return sample if request.head_T is None else self._complete(sample, request)

    def _laid_out(self, request: _Open) -> tuple[int, np.ndarray, np.ndarray]:
        """The first position; and of each from there on, the piece that holds it (-1: none) and the place of its row.
        Later pieces overwrite earlier ones."""
        start = min(piece.span.start for piece in request.pieces)
        end = max(piece.span.start + piece.span.length for piece in request.pieces)
        end = min(end, start + request.tokens)  # beyond are only pieces after a hole
        piece_T, place_T = np.full(end - start, -1), np.zeros(end - start, np.int64)
        reached = start
        for i, (span, _, place) in enumerate(request.pieces):
            length = max(0, min(span.length, end - span.start))
            self._ledger.drop("gap", span.length - length)
            at = slice(span.start - start, span.start - start + length)
            if span.start < reached:
                self._ledger.drop("repeated", int(np.count_nonzero(piece_T[at] >= 0)))
            piece_T[at], place_T[at] = i, np.arange(place, place + length)
            reached = max(reached, span.start + length)
        return start, piece_T, place_T

    def _complete(self, sample: Sample, request: _Open) -> Sample:
        """The sample with the states of its prefix, as far as they are known and fit; its own are kept for others."""
        prefix_T = request.head_T[: sample.start]
        whole_T = torch.cat([prefix_T, sample.tokens_T])
        found = self._prefixes.restore(prefix_T) if len(prefix_T) else None
        self._prefixes.put(whole_T, sample.start, sample.rows)
        room = self._max_tokens - len(sample)
        if found is None or not room:
            return sample
        start = max(found.start, sample.start - room)
        restored = sample.start - start
        # Only a prompt of which nothing was computed here ends in a row whose next token is the answer's.
        restored_is_generated = torch.arange(start, sample.start) + 1 >= request.prompt_tokens
        return replace(
            sample,
            start=start,
            **fields_of(Rows.joined([found.rows.pick(slice(start - found.start, None)), sample.rows])),
            generated_T=torch.cat([restored_is_generated, sample.generated_T]),
            rejected_T=F.pad(sample.rejected_T, (restored, 0), value=-1),
            restored=restored,
        )

    def _leave_out(self, reason: str, piece_T: np.ndarray, kept: int) -> int:
        self._ledger.drop(reason, int(np.count_nonzero(piece_T[kept:] >= 0)))
        return min(kept, len(piece_T))

    def _leave_out_not_finite(self, rows: Rows) -> int:
        """How many of the rows come before the first that is not finite; what comes after it is after a hole."""
        is_finite_N = rows.is_finite_N()
        bad, kept = int((~is_finite_N).sum()), int(is_finite_N.long().argmin())
        self._drop_not_finite(bad)
        self._ledger.drop("gap", len(is_finite_N) - kept - bad)
        return kept

    def _drop_not_finite(self, tokens: int) -> None:
        if "not_finite" not in self._ledger.dropped:
            logger.warning("draft training: states of the target that are not finite are left out, and counted")
        self._ledger.drop("not_finite", tokens)
