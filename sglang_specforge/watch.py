"""Live acceptance is looked at all the time: the guard takes versions back, and drift of the traffic is made known."""

import logging
import time
from typing import Any

from sglang_specforge.drift import ALL, Drift, Move
from sglang_specforge.export.acceptance import Histogram, summary
from sglang_specforge.guard import Cleared, Guard, Worse
from sglang_specforge.manifest import Mode
from sglang_specforge.swaps import DraftHeld, NotAttached, SwapRefused, Swaps, UnknownVersion

logger = logging.getLogger(__name__)


class Watch:
    """Of one server."""

    def __init__(self, swaps: Swaps) -> None:
        self._swaps, self._guard, self._drift = swaps, Guard(), Drift()
        self._gate_before: Mode | None = None  # a version was taken back

    def status(self) -> dict[str, Any]:
        return {"guard": self._guard.status(), "drift": self._drift.status()}

    async def look(self, ranks: list[dict[str, Any]], *, drafting: bool = True) -> None:
        """At each replica's counts (``Swaps.ranks``). During an A/B nothing is said: versions change all the time. Nor
        while only trials draft: what was served between them has left holes in the draft's KV cache."""
        if self._swaps.holder is not None or not drafting:
            self._guard.forget()
            self._drift.forget()
            return
        try:
            await self._look(ranks[0]["bank"]["active_version"], [rank["export"] for rank in ranks if rank["export"]])
        except (SwapRefused, DraftHeld, UnknownVersion, NotAttached) as error:
            logger.error("draft training: the guard cannot do its work: %s", error)

    async def _look(self, version: int, exports: list[dict[str, Any]]) -> None:
        for found in self._drift.look(version, by_slice(exports)):
            if isinstance(found, Move):
                self._guard.forget()  # what it compares with is of other traffic
                self._tell("drift", found.name, found.why)
            else:
                self._tell("drift_over", found.name, found.why)
        if self._swaps.gate == "off":
            self._guard.forget()
            return
        found = self._guard.look(version, by_version(exports).get(str(version)))
        if isinstance(found, Worse) and version == self._swaps.active:
            logger.warning("draft training: version %d is taken back: %s", version, found.why)
            self._gate_before = self._swaps.gate
            await self._swaps.roll_back("guard", found.why)
        elif isinstance(found, Cleared):
            await self._restore(found)

    async def _restore(self, found: Cleared) -> None:
        """The version was not to blame; what it showed is a move of the traffic."""
        suspect = found.suspect
        logger.warning("draft training: version %d was not to blame: %s", suspect.version, found.why)
        self._tell("drift", ALL, self._drift.moved(ALL, time.time(), suspect.before, suspect.now).why)
        await self._swaps.activate(suspect.version, "guard", found.why)
        if self._swaps.gate == "propose" and self._gate_before is not None:
            self._swaps.set_gate(self._gate_before, "guard", "as before the rollback")

    def _tell(self, event: str, name: str, why: str) -> None:
        """In the audit log, and to the trainer by the manifest."""
        logger.warning("draft training: %s: %s", event, why)
        self._swaps.audit.write(event, "server", slice=name or None, why=why)
        self._swaps.set_moved({name: move.since_s for name, move in self._drift.moves.items()})


def by_version(exports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``acceptance.summary`` of each draft version, over all exporters."""
    return _by_number([export["committed_by_version"] for export in exports])


def by_slice(exports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``acceptance.summary`` of all traffic (``drift.ALL``) and of each slice, over all exporters."""
    histograms = [{ALL: export["committed"], **export["committed_by_slice"]} for export in exports]
    return _summaries(histograms, sorted({name for by_slice in histograms for name in by_slice}))


def by_prompt(exports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``acceptance.summary`` of each class of prompt lengths, by its longest, over all exporters."""
    return _by_number([export["committed_by_prompt"] for export in exports])


def _by_number(histograms: list[dict[str, Histogram]]) -> dict[str, dict[str, Any]]:
    return _summaries(histograms, sorted({number for counts in histograms for number in counts}, key=int))


def _summaries(histograms: list[dict[str, Histogram]], names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: summary(counts[name] for counts in histograms if name in counts) for name in names}
