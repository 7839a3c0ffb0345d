"""Taking back a version that live traffic accepts less of than of the one before it."""

import math
import statistics
from collections import deque
from typing import Any

from sglang_specforge.ab.sequential import always_valid_interval

_MIN_PASSES = 30  # verifications of a request that one look has to see
_ALPHA = 0.01  # chance of ever taking back a version that is as good
_FEWEST = 5  # looks at a version of which anything is said
_REMEMBERED, _WATCHED = 30, 60  # looks at the earlier version, and at the new one


class Guard:
    """Is shown the counts of live acceptance again and again, about every two seconds."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._seen = (0, 0)  # passes and tokens of the version at the last look
        self._lengths: deque[float] = deque(maxlen=_WATCHED)  # acceptance length between two looks
        self._before: list[float] = []  # of the version that was active before

    def look(self, version: int, seen: dict[str, Any] | None) -> str | None:
        """Why the active version is worse than the one before it, beyond chance; None where that is not known.

        ``seen`` is its ``export.acceptance.summary`` since the server's start. The earlier version's mean counts as
        known to within two standard errors.
        """
        counts = (seen["passes"], seen["tokens"]) if seen else (0, 0)
        if version != self._version:
            self._before = [] if self._version is None else list(self._lengths)[-_REMEMBERED:]
            self._version, self._seen = version, counts
            self._lengths.clear()
            return None
        passes, tokens = (now - then for now, then in zip(counts, self._seen, strict=True))
        if passes < _MIN_PASSES:
            return None
        self._seen = counts
        self._lengths.append(tokens / passes)
        return self._judge()

    def forget(self) -> None:
        """What follows says nothing of what was before."""
        self._version, self._before = None, []
        self._lengths.clear()

    def status(self) -> dict[str, Any]:
        """How often the active version was looked at, and the one before it."""
        return {"version": self._version, "looks": len(self._lengths), "looks_before": len(self._before)}

    def _judge(self) -> str | None:
        if min(len(self._before), len(self._lengths)) < _FEWEST or len(self._lengths) == _WATCHED:
            return None
        mean = statistics.fmean(self._before)
        error = statistics.stdev(self._before, mean) / len(self._before) ** 0.5 / mean
        found = always_valid_interval([math.log(length / mean) for length in self._lengths], _ALPHA)
        if found.high >= -2 * error:
            return None
        return (
            f"acceptance length {mean * math.exp(found.mean):.3f} on live traffic, of the version before {mean:.3f} "
            f"(at least {-math.expm1(found.high):.1%} less)"
        )
