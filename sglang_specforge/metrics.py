"""Prometheus series beside ``sglang:*``, where SGLang serves those (``--enable-metrics``).

They are made of the status whenever somebody scrapes, not kept in prometheus-client's files of several processes, from
which no series can be removed: of versions there are as many as the status has, however many come and go. Slices have
none: what clients call them is for those with the key to ``/draft/status``, and SGLang serves metrics to anybody.
"""

from collections.abc import Callable, Iterator
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
    "swaps": ("", "Times that draft weights were copied into service."),
    "verifications": ("version", "Verifications of a request, by draft version (the newest 32)."),
    "committed_tokens": ("version", "Tokens that they committed, bonus tokens included."),
    "captured_tokens": ("", "Tokens whose states were captured."),
    "trained_tokens": ("", "Captured tokens that were trained on."),
    "dropped_tokens": ("reason", "Captured tokens that were dropped."),
    "skipped_steps": ("", "Optimizer steps that changed nothing, as their gradients were not finite."),
    "taken_up": ("", "Times that training went on from the draft in service, as its own was worse."),
    "unspilled_blocks": ("", "Blocks of the prefix store that the disk did not take or give back."),
}


class Metrics:
    """A collector of prometheus-client's, in the HTTP process; what the status does not know has no sample.

    Args:
        status: gives the newest that is known, as ``GET /draft/status`` does.
    """

    def __init__(self, status: Callable[[], dict[str, Any] | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        """The families of metrics, for ``CollectorRegistry``."""
        # Here: SGLang has to say first where several processes keep theirs.
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if (status := self._status()) is None:
            return
        gauges, counters = _gauges(status), _counters(status)
        for name, what in _GAUGES.items():
            if (value := gauges[name]) is not None:
                yield GaugeMetricFamily(_PREFIX + name, what, value)
        for name, (label, what) in _COUNTERS.items():
            family = CounterMetricFamily(_PREFIX + name, what, labels=[label] if label else [])
            for told, value in counters[name].items():
                family.add_metric([told] if label else [], value)
            yield family


def _gauges(status: dict[str, Any]) -> dict[str, float | None]:
    draft, trainer = status["draft"], status["trainer"]
    active = draft["active_version"]
    return {
        "active_version": active,
        "acceptance_length": status["acceptance_by_version"].get(str(active), {}).get("length"),
        "held_out_acceptance_length": trainer["held_out_acceptance_length"],
        "draft_vocabulary_coverage": trainer["vocabulary"]["coverage"],
        "drafting": draft["drafting"]["depth"] == "on",
        "break_even_acceptance_length": draft["drafting"]["break_even_length"],
        "moved_slices": len(draft["drift"]["moved"]),
        "trainer_step": trainer["step"],
        "trainer_silent_seconds": trainer["silent_s"],
    }


def _counters(status: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By label, which is none of most."""
    tokens, by_version = status["tokens"], status["acceptance_by_version"]
    return {
        "swaps": {"": status["draft"]["swaps"]},
        "verifications": {version: seen["passes"] for version, seen in by_version.items()},
        "committed_tokens": {version: seen["tokens"] for version, seen in by_version.items()},
        "captured_tokens": {"": tokens["captured"]},
        "trained_tokens": {"": tokens["trained"]},
        "dropped_tokens": tokens["dropped"],
        "skipped_steps": {"": status["trainer"]["skipped_steps"]},
        "taken_up": {"": status["trainer"]["taken_up"]},
        "unspilled_blocks": {"": status["trainer"]["prefixes"]["unspilled_blocks"]},
    }
