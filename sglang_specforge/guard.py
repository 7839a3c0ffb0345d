"""Taking back a version that live traffic accepts less of than of the one before it.

Where the version before it does no better then, it was the traffic that had changed, and the version is cleared.
"""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from sglang_specforge.ab.sequential import always_valid_interval

_MIN_PASSES = 30  # verifications of a request that one look has to see
_ALPHA = 0.01  # chance of ever taking back a version that is as good
_FEWEST = 5  # looks at a version of which anything is said
_REMEMBERED, _WATCHED = 30, 60  # looks at the earlier version, and at the new one


class Worse(NamedTuple):
    """``version`` had an acceptance length of ``now``, and the one before it ``before``; it is to be taken back."""

    version: int
    before: float
    now: float
    why: str


class Cleared(NamedTuple):
    """The version before it did no better in its place."""

    suspect: Worse
    why: str


class Guard:
    """Is shown the counts of live acceptance again and again, about every two seconds."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._seen = (0, 0)  # passes and tokens of the version at the last look
        self._lengths: deque[float] = deque(maxlen=_WATCHED)  # acceptance length between two looks
        self._before: list[float] = []  # of the version that was active before
        self._suspect: Worse | None = None  # has been taken back, rightly or not

    def look(self, version: int, seen: dict[str, Any] | None) -> Worse | Cleared | None:
        """What is known beyond chance of the active version, or of the one that was taken back for it.

        ``seen`` is its ``export.acceptance.summary`` since the server's start. The earlier version's mean counts as
        known to within two standard errors.
        """
        counts = (seen["passes"], seen["tokens"]) if seen else (0, 0)
        if version != self._version:
            if self._version is not None or (self._suspect and version == self._suspect.version):
                self._suspect = None
            self._before = [] if self._version is None else list(self._lengths)[-_REMEMBERED:]
            self._version, self._seen = version, counts
            self._lengths.clear()
            return None
        passes, tokens = (now - then for now, then in zip(counts, self._seen, strict=True))
        if passes < _MIN_PASSES:
            return None
        self._seen = counts
        self._lengths.append(tokens / passes)
        return self._clear() if self._suspect else self._judge()

    def forget(self) -> None:
        """What follows says nothing of what was before."""
        self._version, self._before, self._suspect = None, [], None
        self._lengths.clear()

    def status(self) -> dict[str, Any]:
        """How often the active version was looked at, and the one before it."""
        return {"version": self._version, "looks": len(self._lengths), "looks_before": len(self._before)}

    def _judge(self) -> Worse | None:
        if min(len(self._before), len(self._lengths)) < _FEWEST or len(self._lengths) == _WATCHED:
            return None
        mean = statistics.fmean(self._before)
        error = statistics.stdev(self._before, mean) / len(self._before) ** 0.5 / mean
        found = always_valid_interval([math.log(length / mean) for length in self._lengths], _ALPHA)
        if found.high >= -2 * error:
            return None
        length = mean * math.exp(found.mean)
        why = (
            f"acceptance length {length:.3f} on live traffic, of the version before {mean:.3f} "
            f"(at least {-math.expm1(found.high):.1%} less)"
        )
        suspect = Worse(self._version, mean, length, why)
        self.forget()
        self._suspect = suspect
        return suspect

    def _clear(self) -> Cleared | None:
        """The middle between the two lengths tells which of them the earlier version has now."""
        if len(self._lengths) < _FEWEST:
            return None
        suspect, self._suspect = self._suspect, None
        length = statistics.fmean(self._lengths)
        if length >= math.sqrt(suspect.before * suspect.now):
            return None
        return Cleared(suspect, f"acceptance length {length:.3f} of the version before it too, no longer its usual one")
