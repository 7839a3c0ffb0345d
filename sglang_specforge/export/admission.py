"""Which requests are captured when not all can be: whole ones, by a fair draw.

Each request draws a number in [0, 1) at its first pass, and is captured while that number is below ``share``. What
finds no room in the ring, or exceeds the budget of bytes a second, lowers the share, and the requests that are then
above it are cut short: at any time the captured ones are those of the smallest numbers, however early or late they came
(a bottom-k sample). The share rises again only while use stays clearly below the limits, so it does not flap.
"""

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_specforge.contracts.spans import numbered
from sglang_specforge.export.acceptance import CARRIED_OVER_PASSES, Standing
from sglang_specforge.export.ring import HostRing

logger = logging.getLogger(__name__)

_LOWER_EVERY_S, _RAISE_EVERY_S = 0.25, 1.0
_AIM, _RAISE_BELOW = 0.9, 0.8  # of the budget: what a change of the share aims at, and where it may rise
_RAISE = 1.25  # a second, at most
_FLOOR = 1 / 64  # the share that is always tried again


class ServedRequest(Protocol):
    """A request of the server: what does not change from its first pass on, and how it ended (exporter thread)."""

    rid: str
    alias: str  # what it is called in the stream; ``Admission`` gives it a number, so that no other is called so
    prompt_tokens: int
    cached_tokens: int
    prompt: Sequence[int]  # its tokens, where another server prefills it; else nothing
    slice: str  # its label
    refusal: str | None  # why it is never captured
    is_counted: bool  # False for a health check

    def is_finished(self) -> bool: ...
    def is_aborted(self) -> bool: ...
    def total_tokens(self) -> int: ...


@dataclass(slots=True)
class Admitted:
    """A request from its first pass to its end."""

    request: ServedRequest
    own: Any  # the server's, which it is known by: users give ids, and may give one again
    drawn: float
    left_out: str | None = None  # why it is not captured, or not any more
    aborted: bool = False
    window: int = 0  # that saw its last pass, of an A/B
    window_passes: int = 0  # verifications in it
    began_in: int | None = None

    def enter(self, window: int) -> None:
        """The request is in a pass of this window."""
        if self.began_in is None:
            self.began_in = window
        if window != self.window:
            self.window, self.window_passes = window, 0

    def verify_in(self, window: int) -> Standing:
        """The request is verified in this window: what that verification counts for."""
        self.enter(window)
        self.window_passes += 1
        if self.began_in == window:
            return Standing.FRESH
        return Standing.SETTLED if self.window_passes > CARRIED_OVER_PASSES else Standing.CARRIED_OVER

    @property
    def has_ended(self) -> bool:
        return self.aborted or self.request.is_finished()


@dataclass
class RequestCounts:
    """seen = captured + left out."""

    seen: int = 0
    cut_short: int = 0  # of those left out, the ones that had been admitted at first
    left_out: Counter[str] = field(default_factory=Counter)


class Admission:
    """The scheduler thread picks; the exporter thread learns what was cut short and what has ended.

    ``describe`` makes a ServedRequest of a server's own, at its first pass. ``sample`` is the share of requests that is
    wanted; ``max_bytes_s`` (or None) bounds the captured bytes a second, with a second's worth to spare for bursts.
    """

    def __init__(
        self,
        ring: HostRing,
        describe: Callable[[Any], ServedRequest],
        sample: float = 1.0,
        max_bytes_s: float | None = None,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.closed: str | None = "nobody_listening"  # why nothing is captured; the exporter thread sees to it
        self.counts = RequestCounts()
        self.cut: deque[str] = deque()  # aliases, for the exporter thread to announce
        self._ring, self._describe, self._sample, self._max_bytes_s = ring, describe, sample, max_bytes_s
        self._share, self._lowered_by = sample, ""
        self._begun = 0
        self._requests: dict[int, Admitted] = {}  # by the identity of the server's own
        self._random, self._clock = random.Random(seed), clock
        self._spare = max_bytes_s  # bytes that may be captured at once; negative after too much
        self._spent, self._looked_s, self._judged_s = 0, clock(), clock()

    @property
    def share(self) -> float:
        """Of the requests that come now, how many are captured."""
        return self._share

    def pick(self, requests: Sequence[Any], nbytes: Sequence[int]) -> list[Admitted]:
        """The pass's requests, given the bytes that each would take. Those that are not ``left_out`` are to be
        captured; together they fit the ring."""
        self._watch_budget()
        known = self._requests
        admitted = [known.get(id(r)) or self._begin(r) for r in requests]
        captured = [(one, size) for one, size in zip(admitted, nbytes, strict=True) if one.left_out is None]
        if (closed := self.closed) is not None:  # read once: the exporter thread may change it at any time
            self._cut([one for one, _ in captured], closed)
            return admitted
        if (size := sum(size for _, size in captured)) > self._ring.room_bytes():
            size = self._fit(captured)
        self._spent += size
        if self._spare is not None:
            self._spare -= size
        return admitted

    def abort(self, rid: str) -> None:
        """The request ends without another pass."""
        for admitted in list(self._requests.values()):
            if admitted.request.rid == rid:
                admitted.aborted = True

    def take_ended(self) -> list[Admitted]:
        """Requests that have ended since the last call (exporter thread)."""
        ended = [a for a in list(self._requests.values()) if a.has_ended]
        for admitted in ended:
            del self._requests[id(admitted.own)]
        return ended

    def status(self) -> dict[str, Any]:
        counts = self.counts
        left_out = dict(counts.left_out)
        captured = counts.seen - sum(left_out.values())
        requests = {"seen": counts.seen, "captured": captured, "cut_short": counts.cut_short, "left_out": left_out}
        return {"closed": self.closed, "share": self._share, "requests": requests}

    def _begin(self, request: Any) -> Admitted:
        served = self._describe(request)
        self._begun += 1
        served.alias = numbered(served.alias, self._begun)
        admitted = Admitted(served, request, self._random.random(), served.refusal)
        self._requests[id(request)] = admitted
        if admitted.left_out is None and (closed := self.closed) is not None:
            admitted.left_out = closed
        elif admitted.left_out is None and admitted.drawn >= self._share:
            admitted.left_out = "sampled_out" if admitted.drawn >= self._sample else self._lowered_by
        if served.is_counted:
            self.counts.seen += 1
            if admitted.left_out is not None:
                self.counts.left_out[admitted.left_out] += 1
        return admitted

    def _fit(self, captured: list[tuple[Admitted, int]]) -> int:
        """Cut requests short, those of the largest numbers first, until the pass fits the ring; returns its bytes."""
        for one, size in captured:
            if size > self._ring.capacity_bytes:
                self._cut([one], "larger_than_ring")
        kept = sorted((pair for pair in captured if pair[0].left_out is None), key=lambda pair: pair[0].drawn)
        total, room = sum(size for _, size in kept), self._ring.room_bytes()
        while total > room:
            one, size = kept.pop()
            self._lower(one.drawn, "ring_full")
            self._cut([one], "ring_full")
            total -= size
        return total

    def _watch_budget(self) -> None:
        """Lower or raise the share by what was captured since it was last judged."""
        now_s = self._clock()
        since_s, budget = now_s - self._judged_s, self._max_bytes_s
        if budget is not None:
            self._spare = min(budget, self._spare + budget * (now_s - self._looked_s))
        self._looked_s = now_s
        over = budget is not None and self._spare < 0
        if since_s < (_LOWER_EVERY_S if over else _RAISE_EVERY_S):
            return
        used = self._spent / since_s / budget if budget else 0.0
        if over and used > 1:
            self._lower(self._share * _AIM / used, "over_budget")
            above = [a for a in list(self._requests.values()) if a.left_out is None and a.drawn >= self._share]
            self._cut(above, "over_budget")
        elif not over and used < _RAISE_BELOW and self._ring.used_bytes <= self._ring.capacity_bytes // 2:
            self._share = min(self._sample, self._share * min(_RAISE**since_s, _AIM / used if used else _RAISE**60))
        self._spent, self._judged_s = 0, now_s

    def _lower(self, share: float, reason: str) -> None:
        self._share = min(self._share, max(share, _FLOOR * self._sample))
        self._lowered_by = reason

    def _cut(self, admitted: list[Admitted], reason: str) -> None:
        if admitted and reason not in self.counts.left_out:
            logger.warning("draft training: requests are left out (%s); serving is not affected", reason)
        for one in admitted:
            one.left_out = reason
            self.counts.left_out[reason] += 1
            self.counts.cut_short += 1
            self.cut.append(one.request.alias)
