"""Prometheus series beside ``sglang:*``, where SGLang serves those (``--enable-metrics``)."""

import os
from collections.abc import Iterator
from typing import Any

_PREFIX = "sglang_specforge:"
_GAUGES = {
    "active_version": "Draft version in service.",
    "acceptance_length": "Tokens a verification, of the draft version in service, since the server's start.",
    "held_out_acceptance_length": "Of the newest draft version, by simulation on held-out samples.",
    "draft_vocabulary_coverage": "Share of what is trained on that the newest draft version can say.",
    "drafting": "1 while steps draft, else 0.",
    "break_even_acceptance_length": "At which drafting is as fast as none, as measured last.",
    "moved_slices": "Slices, and all traffic as one, whose acceptance fell and has not recovered (drift).",
    "trainer_step": "Optimizer steps.",
    "trainer_silent_seconds": "Since the trainer was last heard of.",
}
_COUNTERS = {
    "swaps": ((), "Times that draft weights were copied into service."),
    "verifications": (("version",), "Verifications of a request, by draft version."),
    "committed_tokens": (("version",), "Tokens that they committed, bonus tokens included."),
    "captured_tokens": ((), "Tokens whose states were captured."),
    "trained_tokens": ((), "Captured tokens that were trained on."),
    "dropped_tokens": (("reason",), "Captured tokens that were dropped."),
    "unspilled_blocks": ((), "Blocks of the prefix store that the disk did not take or give back."),
}


class Metrics:
    """Of the HTTP process, from one status after another."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge  # here: SGLang first says where several processes keep theirs

        self._gauges = {
            name: Gauge(_PREFIX + name, what, multiprocess_mode="mostrecent") for name, what in _GAUGES.items()
        }
        self._counters = {name: Counter(_PREFIX + name, what, labels) for name, (labels, what) in _COUNTERS.items()}
        self._counted: dict[tuple[str, ...], float] = {}

    @classmethod
    def served(cls) -> "Metrics | None":
        """None where SGLang serves no metrics."""
        return cls() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None

    def show(self, status: dict[str, Any]) -> None:
        """A status as ``GET /draft/status`` gives it; what it does not know keeps its last value."""
        for name, value in _gauged(status):
            if value is not None:
                self._gauges[name].set(value)
        for key, value in _counted(status):
            name, *labels = key
            more = value - self._counted.get(key, 0)
            if more > 0:  # a trainer that started anew may know of fewer
                counter = self._counters[name]
                (counter.labels(*labels) if labels else counter).inc(more)
                self._counted[key] = value


def _gauged(status: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    active = status["draft"]["active_version"]
    yield "active_version", active
    yield "drafting", status["draft"]["drafting"]["depth"] == "on"
    yield "break_even_acceptance_length", status["draft"]["drafting"]["break_even_length"]
    yield "moved_slices", len(status["draft"]["drift"]["moved"])
    yield "acceptance_length", status["acceptance_by_version"].get(str(active), {}).get("length")
    yield "held_out_acceptance_length", status["trainer"]["held_out_acceptance_length"]
    yield "draft_vocabulary_coverage", status["trainer"]["vocabulary"]["coverage"]
    yield "trainer_step", status["trainer"]["step"]
    yield "trainer_silent_seconds", status["trainer"]["silent_s"]


def _counted(status: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    yield ("swaps",), status["draft"]["swaps"]
    for version, seen in status["acceptance_by_version"].items():
        yield ("verifications", version), seen["passes"]
        yield ("committed_tokens", version), seen["tokens"]
    yield ("captured_tokens",), status["tokens"]["captured"]
    yield ("trained_tokens",), status["tokens"]["trained"]
    for reason, tokens in status["tokens"]["dropped"].items():
        yield ("dropped_tokens", reason), tokens
    yield ("unspilled_blocks",), status["trainer"]["prefixes"]["unspilled_blocks"]
