"""How long decode passes take with drafting and without it, by batch size, and the tokens that they commit; and how
long those take in which the draft is swapped."""

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

_LONGEST_S = 1.0  # of a pass; more is a pause
_REMEMBERED, _FEWEST = 64, 8  # passes without a swap, whose median a pass with one is compared with


@dataclass(slots=True)
class Paced:
    """Totals of passes of about the same batch size."""

    passes: int = 0
    seconds: float = 0.0
    verifications: int = 0  # of a request
    tokens: int = 0
    calm_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))


class Pace:
    """Of one exporting rank. A pass lasts from one verification to the next, where nothing came in between."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._last_key = (False, 0)
        self._totals: dict[tuple[bool, int], Paced] = {}
        self._version: int | None = None
        self._swaps, self._longest_swap = 0, 0.0  # passes with one, and the longest, in medians of those without

    def interrupt(self) -> None:
        """Another kind of pass came in between (scheduler thread)."""
        self._last_s = None

    def lap(self, drafted: bool, requests: int) -> float | None:
        """Seconds since the verification before, if it was of the same kind (scheduler thread)."""
        now_s, key = time.perf_counter(), (drafted, size_class(requests))
        seconds = None if self._last_s is None or key != self._last_key else now_s - self._last_s
        self._last_s, self._last_key = now_s, key
        return seconds if seconds is None or seconds < _LONGEST_S else None

    def count(self, version: int, drafted: bool, requests: int, seconds: float | None, committed: list[int]) -> None:
        """A pass, and its lap if it had one (exporter thread)."""
        swapped, self._version = self._version not in (None, version), version
        if seconds is None:
            return
        totals = self._totals.setdefault((drafted, size_class(requests)), Paced())
        if not swapped:
            totals.calm_s.append(seconds)
        elif len(totals.calm_s) >= _FEWEST:
            self._swaps += 1
            self._longest_swap = max(self._longest_swap, seconds / statistics.median(totals.calm_s))
        totals.passes += 1
        totals.seconds += seconds
        totals.verifications += len(committed)
        totals.tokens += sum(committed)

    def status(self) -> dict[str, dict[str, list[float]]]:
        """By ``drafted``/``undrafted`` and by the largest batch size of a class: passes, seconds, verifications of a
        request, and tokens they committed, since the server's start."""
        found: dict[str, dict[str, list[float]]] = {"drafted": {}, "undrafted": {}}
        for (drafted, largest), t in list(self._totals.items()):
            kind = found["drafted" if drafted else "undrafted"]
            kind[str(largest)] = [t.passes, t.seconds, t.verifications, t.tokens]
        return found

    def swap_steps(self) -> dict[str, float]:
        """Passes in which the draft was swapped, and the longest of them, in medians of those without a swap at its
        batch size; 0 before the first."""
        return {"timed": self._swaps, "longest_to_median": self._longest_swap}


def size_class(count: int) -> int:
    """Of 1, 2, 3 to 4, 5 to 8, ..., the largest: 1, 2, 4, 8, ..."""
    return 1 << max(0, count - 1).bit_length()
