"""A/B on one live server: turns of the arms, until the comparison is settled. Serving and its output are untouched."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from sglang_specforge.ab.comparison import judge
from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.report import Arm, Report
from sglang_specforge.ab.turns import compare
from sglang_specforge.ab.windows import Windows
from sglang_specforge.swaps import Swaps

logger = logging.getLogger(__name__)


class UnknownExperiment(LookupError):
    """There is no A/B of this id."""


class Experiments:
    """All of a run folder, one of them running at most."""

    def __init__(self, swaps: Swaps, windows: Windows, folder: Path) -> None:
        self._swaps, self._windows, self._folder = swaps, windows, folder
        self._reports = {report.id: report for report in self._load()}
        self._running: asyncio.Task | None = None
        self._abandoned = False

    def all(self) -> list[Report]:
        """Oldest first."""
        return list(self._reports.values())

    def get(self, id: str) -> Report:
        """Raises UnknownExperiment."""
        if id not in self._reports:
            known = ", ".join(self._reports) or "none"
            raise UnknownExperiment(f"there is no A/B {id!r}; there are: {known}")
        return self._reports[id]

    async def start(self, plan: Plan, who: str) -> Report:
        """Begin; returns at once, with the versions of all arms resident on every rank.

        Raises:
            DraftHeld: another one is running.
            UnknownVersion, SwapRefused: an arm cannot be served; or this server verifies nothing.
        """
        self._windows.check_there_are_any()
        incumbent = self._swaps.active
        versions = [incumbent if arm == "active" else self._swaps.known(arm) for arm in plan.arms]
        id = self._next_id()
        await self._swaps.hold(f"ab/{id}", sorted({incumbent, *versions}))
        paths = [str(self._swaps.path(version)) for version in versions]
        report = self._reports[id] = Report(
            id=id, who=who, plan=plan, incumbent=incumbent, began=datetime.now(UTC),
            arms=[Arm(version=version, path=path) for version, path in zip(versions, paths, strict=True)],
            judgement=judge([], len(versions), plan),
        )  # fmt: skip
        self._swaps.audit.write("ab_began", who, id=id, arms=versions, plan=plan.model_dump())
        self._running = asyncio.create_task(self._run(report), name=f"specforge-ab-{id}")
        await asyncio.sleep(0)  # a task that is cancelled before it runs would not let the draft go
        return report

    async def stop(self, id: str, who: str) -> Report:
        """End it if it runs: what was active before is active again. Raises UnknownExperiment."""
        report = self.get(id)
        if report.state == "running":
            report.why = f"stopped by {who}"
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
        return report

    def abandon(self) -> None:
        """The server ends: nothing more can be asked of its schedulers."""
        self._abandoned = True
        if self._running is not None:
            self._running.cancel()

    async def _run(self, report: Report) -> None:
        """To its end, whatever happens: then the draft is let go, and only then the report says that it is over."""
        state = "ended"
        try:
            try:
                await compare(report, self._windows, self._save)
            except asyncio.CancelledError:
                if self._abandoned:
                    raise
                state = "stopped"
            finally:
                if not self._abandoned:
                    await self._windows.close(report.incumbent)
            if (winner := report.to_promote) is not None:
                await self._swaps.activate(winner, f"ab/{report.id}", report.why)
                report.promoted = True
        except Exception as error:  # a draft that nobody lets go could not be changed any more
            state, report.why = "failed", str(error)
            logger.exception("draft training: A/B %s failed", report.id)
        finally:
            self._swaps.let_go()
        report.state, report.ended = state, datetime.now(UTC)
        self._save(report)
        facts = report.model_dump(include={"state", "outcome", "winner", "promoted", "why"})
        self._swaps.audit.write("ab_ended", report.who, id=report.id, blocks=len(report.blocks), **facts)

    def _next_id(self) -> str:
        return str(max((int(id) for id in self._reports), default=0) + 1)

    def _save(self, report: Report) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._folder / f"{report.id}.json.part"
            part.write_text(report.model_dump_json())
            part.replace(self._folder / f"{report.id}.json")
        except OSError as error:
            logger.error("draft training: A/B %s is not saved: %s", report.id, error)

    def _load(self) -> Iterator[Report]:
        """What earlier servers left; one that was running ended with its server."""
        files = sorted((f for f in self._folder.glob("*.json") if f.stem.isdigit()), key=lambda f: int(f.stem))
        for file in files:
            try:
                report = Report.model_validate_json(file.read_bytes())
            except (OSError, ValidationError) as error:
                logger.error("draft training: %s is left out: %s", file, error)
                continue
            if report.state == "running":
                report.state, report.why = "interrupted", "the server ended"
            yield report
