"""How many tokens verifications commit: overall, by draft version, slice, prompt length, and window of an A/B (exporter
thread).

A histogram holds, at index n, the verifications of a request that committed n tokens, the bonus token included: enough
for the acceptance length and for how often the draft was right at each depth.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import Any

from sglang_specforge.export.pace import size_class

Histogram = list[int]
CARRIED_OVER_PASSES = 8  # verifications of a running request that a window leaves out at its beginning
_SHORT = 128  # tokens of a prompt: the first class, each next one twice as long
_VERSIONS, _WINDOWS, _SLICES = 32, 8, 32  # the newest, that are kept apart; of slices, those last served


class Standing(IntEnum):
    """Of a verification in a window: how much of the arm before it may still be felt."""

    CARRIED_OVER = 0  # among the first of a request that ran when the window began
    SETTLED = 1
    FRESH = 2  # the request began in this window


class Acceptance:
    """Counters of one exporting rank; memory is bounded."""

    def __init__(self) -> None:
        self._total: Histogram = []
        self._by_version: dict[int, Histogram] = {}
        self._by_slice: OrderedDict[str, Histogram] = OrderedDict()
        self._by_prompt: dict[int, Histogram] = {}  # by longest prompt of a class
        self._by_window: dict[int, list[Histogram]] = {}  # by Standing

    def count(
        self,
        version: int,
        committed: list[int],
        slices: Iterable[str],
        prompts: Iterable[int],
        window: int = 0,
        standings: Iterable[int] = (),
    ) -> None:
        """One pass: the tokens that it committed for each request, the request's slice ("": none) and the tokens of its
        prompt; in a window, with each one's ``Standing``."""
        if not committed:
            return
        by_version = self._by_version.setdefault(version, [])
        alike = Counter(zip(committed, slices, map(_prompt_class, prompts), strict=True))  # few, of many requests
        for (tokens, name, longest), requests in alike.items():
            _add(self._total, tokens, requests)
            _add(self._by_prompt.setdefault(longest, []), tokens, requests)
            _add(by_version, tokens, requests)
            if name:
                _add(self._by_slice.setdefault(name, []), tokens, requests)
                self._by_slice.move_to_end(name)
        if window:
            by_standing = self._by_window.setdefault(window, [[] for _ in Standing])
            for (tokens, standing), requests in Counter(zip(committed, standings, strict=True)).items():
                _add(by_standing[standing], tokens, requests)
        _bound(self._by_version, _VERSIONS)
        _bound(self._by_window, _WINDOWS)
        while len(self._by_slice) > _SLICES:
            self._by_slice.popitem(last=False)

    def status(self) -> dict[str, Any]:
        return {
            "committed": list(self._total),
            "committed_by_version": {str(v): list(counts) for v, counts in list(self._by_version.items())},
            "committed_by_slice": {name: list(counts) for name, counts in list(self._by_slice.items())},
            "committed_by_prompt": {str(n): list(counts) for n, counts in list(self._by_prompt.items())},
            "committed_by_window": {
                str(w): [list(counts) for counts in by_standing] for w, by_standing in list(self._by_window.items())
            },
        }


def summary(histograms: Iterable[Histogram]) -> dict[str, Any]:
    """Of several exporters: verifications, the tokens they committed, tokens a verification, and how often the draft
    was right at each depth (share of the verifications whose accepted path is at least so long)."""
    counts = add_up(histograms)
    passes, tokens = sum(counts), sum(n * count for n, count in enumerate(counts))
    right = [sum(counts[depth:]) for depth in range(2, len(counts))]
    return {
        "passes": passes,
        "tokens": tokens,
        "length": tokens / passes if passes else None,
        "right_at_depth": [count / passes for count in right],
    }


def add_up(histograms: Iterable[Histogram]) -> Histogram:
    total: Histogram = []
    for counts in histograms:
        total += [0] * (len(counts) - len(total))
        for n, count in enumerate(counts):
            total[n] += count
    return total


@lru_cache(maxsize=1 << 14)
def _prompt_class(tokens: int) -> int:
    return max(_SHORT, size_class(tokens))


def _add(counts: Histogram, tokens: int, requests: int) -> None:
    counts += [0] * (tokens + 1 - len(counts))
    counts[tokens] += requests


def _bound(by_number: dict[int, Any], most: int) -> None:
    if len(by_number) > most:
        del by_number[min(by_number)]
