"""How long decode passes take with drafting and without it, by batch size, and the tokens that they commit."""

import time
from dataclasses import dataclass

_LONGEST_S = 1.0  # of a pass; more is a pause


@dataclass(slots=True)
class Paced:
    """Totals of passes of about the same batch size."""

    passes: int = 0
    seconds: float = 0.0
    verifications: int = 0  # of a request
    tokens: int = 0


class Pace:
    """Of one exporting rank. A pass lasts from one verification to the next, where nothing came in between."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._last_key = (False, 0)
        self._totals: dict[tuple[bool, int], Paced] = {}

    def interrupt(self) -> None:
        """Another kind of pass came in between (scheduler thread)."""
        self._last_s = None

    def lap(self, drafted: bool, requests: int) -> float | None:
        """Seconds since the verification before, if it was of the same kind (scheduler thread)."""
        now_s, key = time.perf_counter(), (drafted, size_class(requests))
        seconds = None if self._last_s is None or key != self._last_key else now_s - self._last_s
        self._last_s, self._last_key = now_s, key
        return seconds if seconds is None or seconds < _LONGEST_S else None

    def count(self, drafted: bool, requests: int, seconds: float, committed: list[int]) -> None:
        """A pass that had a lap (exporter thread)."""
        totals = self._totals.setdefault((drafted, size_class(requests)), Paced())
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


def size_class(count: int) -> int:
    """Of 1, 2, 3 to 4, 5 to 8, ..., the largest: 1, 2, 4, 8, ..."""
    return 1 << max(0, count - 1).bit_length()
