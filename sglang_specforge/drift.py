"""A fall of acceptance on live traffic, overall or of one slice, while the draft stays the same: traffic has changed.

The Page-Hinkley test (Page, "Continuous inspection schemes", Biometrika 1954; river's) on the logarithm of the
acceptance length of about two seconds, in standard deviations of what was seen of the version at first.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from river.drift import PageHinkley

ALL = ""  # the name of all traffic, beside the slices that requests name
_MIN_PASSES = 30  # verifications of a request that one look has to see
_SETTLING = 4  # looks at which requests still run that began with another draft, or with other traffic
_BASELINE = 12  # looks after them that say what is usual of a version
_LEAST_SPREAD = 0.01  # of a look, relative: a quiet beginning is no promise
_ALLOWED, _THRESHOLD = 0.5, 18.0  # standard deviations: of the mean, and of the sum beyond it that is a fall
_ANCHOR = 50  # looks that what was usual counts for
_RECOVERED, _RECENT = 0.95, 5  # share of the length before, over so many looks, below which a move is one, and ends
_LONGEST_MOVE_S = 1800.0  # what has not recovered by then is what is usual now
_REMEMBERED = 64  # looks


class Move(NamedTuple):
    """Acceptance of ``name`` fell at ``since_s`` (of the epoch), from ``before`` tokens a verification to ``now``."""

    name: str
    since_s: float
    before: float
    now: float

    @property
    def why(self) -> str:
        what = f"of slice {self.name!r}" if self.name else "of all traffic"
        return f"acceptance length {what} fell from {self.before:.3f} to {self.now:.3f} with the draft unchanged"


class Ended(NamedTuple):
    """A move is over."""

    name: str
    why: str


class Drift:
    """Is shown the counts of live acceptance again and again, about every two seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._version = clock, None
        self._levels: dict[str, _Level] = {}
        self._moves: dict[str, Move] = {}

    @property
    def moves(self) -> Mapping[str, Move]:
        """Those that have not ended, by name."""
        return self._moves

    def look(self, version: int, seen: Mapping[str, dict[str, Any]]) -> list[Move | Ended]:
        """What has changed since the last look. ``seen``: ``export.acceptance.summary`` since the server's start, of
        ``ALL`` and of each slice."""
        if version != self._version:
            self.forget()
            self._version = version
        found = []
        for name, summary in seen.items():
            level = self._levels.setdefault(name, _Level())
            fell_from = level.look(summary["passes"], summary["tokens"], self._clock())
            if name in self._moves:
                if why := self._why_ended(self._moves[name], level):
                    del self._moves[name]
                    level.restart()
                    found.append(Ended(name, why))
            elif fell_from is not None:
                found.append(self.moved(name, level.calm_s, fell_from, level.recent))
        for name in self._levels.keys() - seen.keys():  # other slices took its place among those that are counted
            del self._levels[name]
            if self._moves.pop(name, None):
                found.append(Ended(name, "no longer counted"))
        return found

    def moved(self, name: str, since_s: float, before: float, now: float) -> Move:
        """Take down a move, whoever found it."""
        self._moves[name] = move = Move(name, since_s, before, now)
        self._levels[name].restart()
        return move

    def forget(self) -> None:
        """What follows is of another draft: what was usual says nothing of it."""
        self._version = None
        for level in self._levels.values():
            level.restart()

    def status(self) -> dict[str, Any]:
        """Acceptance length now of all traffic ("") and of each slice, with what is usual once that is known; and each
        move's age and lengths."""
        now_s = self._clock()
        return {
            "levels": {name: {"now": level.recent, "usual": level.usual} for name, level in self._levels.items()},
            "moved": {
                name: {
                    "since_s": now_s - move.since_s,
                    "before": move.before,
                    "fell_to": move.now,
                    "now": self._levels[name].recent,
                }
                for name, move in self._moves.items()
            },
        }

    def _why_ended(self, move: Move, level: "_Level") -> str | None:
        if level.looks >= _RECENT and level.recent >= _RECOVERED * move.before:
            return f"acceptance length {level.recent:.3f}, before the fall {move.before:.3f}"
        if self._clock() - move.since_s > _LONGEST_MOVE_S:
            return f"not recovered within {_LONGEST_MOVE_S:.0f} s"
        return None


class _Level:
    """What is usual of all traffic, or of a slice, with one draft version."""

    def __init__(self) -> None:
        self._passes = self._tokens = 0  # at the last look
        self.calm_s = 0.0  # the last look at which nothing was unusual
        self.restart()

    def restart(self) -> None:
        self._lengths: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual: tuple[float, float] | None = None  # mean and spread of the logarithm
        self._test = _anchored_test()

    @property
    def looks(self) -> int:
        return len(self._lengths)

    @property
    def recent(self) -> float | None:
        """Acceptance length of the last few looks."""
        return statistics.fmean(list(self._lengths)[-_RECENT:]) if self._lengths else None

    @property
    def usual(self) -> float | None:
        return None if self._usual is None else math.exp(self._usual[0])

    def look(self, passes: int, tokens: int, now_s: float) -> float | None:
        """Take in the counts; the length that was usual, where it has fallen from there."""
        new_passes, new_tokens = passes - self._passes, tokens - self._tokens
        if new_passes < 0:  # counted anew
            self._passes, self._tokens = passes, tokens
            return None
        if new_passes < _MIN_PASSES:
            return None
        self._passes, self._tokens = passes, tokens
        self._lengths.append(new_tokens / new_passes)
        if self._usual is None:
            self.calm_s = now_s
            if self.looks == _SETTLING + _BASELINE:
                logs = [math.log(length) for length in list(self._lengths)[_SETTLING:]]
                self._usual = statistics.fmean(logs), max(statistics.stdev(logs), _LEAST_SPREAD)
            return None
        mean, spread = self._usual
        unusual = (math.log(self._lengths[-1]) - mean) / spread
        self._test.update(unusual)
        if unusual > -2 * _ALLOWED:
            self.calm_s = now_s
        if not self._test.drift_detected:
            return None
        if self.recent < _RECOVERED * self.usual:
            return self.usual
        self._test = _anchored_test()  # real, but too little to matter, or not yet enough
        return None


def _anchored_test() -> PageHinkley:
    test = PageHinkley(min_instances=1, delta=_ALLOWED, threshold=_THRESHOLD, alpha=1.0, mode="down")
    for _ in range(_ANCHOR):  # its mean follows what it sees: a fall at once would be all it knows
        test.update(0.0)
    return test
