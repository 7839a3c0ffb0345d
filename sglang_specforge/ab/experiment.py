"""A/B on one live server: turns of the arms, until the comparison is settled. Serving and its output are untouched."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from sglang_specforge.ab.comparison import Block, Judgement, Turn, judge
from sglang_specforge.ab.plan import Plan
from sglang_specforge.export.acceptance import Histogram, Standing, add_up, summary
from sglang_specforge.swaps import SwapRefused, Swaps

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class Arm(BaseModel):
    """Totals over its turns, without what is left out at their beginnings; tokens/s is a replica's."""

    version: int
    path: str
    passes: int = 0
    acceptance_length: float | None = None
    tokens_per_s: float | None = None
    out_after_blocks: int | None = None


class Report(BaseModel):
    """``GET /draft/ab/{id}``, and the file ``<run_dir>/ab/<id>.json``."""

    id: str
    state: Literal["running", "ended", "stopped", "failed", "interrupted"] = "running"
    who: str
    plan: Plan
    incumbent: int
    arms: list[Arm]
    blocks: list[Block] = []
    judgement: Judgement
    outcome: str | None = None  # better, worse, alike, or undecided after all blocks; of the first arm's rivals
    winner: int | None = None  # a version
    promoted: bool = False
    why: str = ""
    began: datetime
    ended: datetime | None = None


class UnknownExperiment(LookupError):
    """There is no A/B of this id."""


class Experiments:
    """All of a run folder, one of them running at most."""

    def __init__(self, swaps: Swaps, folder: Path) -> None:
        self._swaps, self._folder = swaps, folder
        self._reports = {report.id: report for report in self._load()}
        self._running: asyncio.Task | None = None
        self._abandoned = False
        self._window = 0  # numbers are never used again: counters of an earlier A/B must not add to a later one's

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
        if self._swaps.only_prefills:
            raise SwapRefused("a prefill server verifies nothing that could be compared; ask its decode server")
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
                await self._compare(report)
            except asyncio.CancelledError:
                if self._abandoned:
                    raise
                state = "stopped"
            finally:
                if not self._abandoned:
                    await self._swaps.show(report.incumbent, draft_training_window=0)
            if report.plan.promote and report.winner not in (None, report.incumbent):
                await self._swaps.activate(report.winner, f"ab/{report.id}", report.why)
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

    async def _compare(self, report: Report) -> None:
        plan, draws = report.plan, random.Random(report.plan.seed)
        for _ in range(plan.max_blocks):
            order = [arm for arm in range(len(report.arms)) if arm not in report.judgement.out]
            draws.shuffle(order)
            report.blocks.append(await self._take_turns(report, order))
            report.judgement = judge(report.blocks, len(report.arms), plan)
            _sum_up(report)
            self._save(report)
            if report.judgement.outcome:
                break
        report.outcome = report.judgement.outcome or "undecided"
        if (winner := report.judgement.winner) is not None:
            report.winner = report.arms[winner].version
        report.why = _in_words(report)

    async def _take_turns(self, report: Report, order: list[int]) -> Block:
        """Each replica serves with every arm once, in this order, and each begins at another place of it: arms are
        compared at the same time, and a replica's load falls on all of them."""
        replicas = sorted({rank["bank"]["replica"] for rank in await self._swaps.ranks()})
        block: Block = [None] * len(report.arms)
        for shift in range(len(order)):
            arms = {replica: order[(place + shift) % len(order)] for place, replica in enumerate(replicas)}
            for arm, turn in (await self._take_window(report, arms)).items():
                block[arm] = block[arm] + turn if block[arm] else turn
        return block

    async def _take_window(self, report: Report, arms: dict[int, int]) -> dict[int, Turn]:
        """Serve with an arm on each replica until the window is long enough, and each arm has seen enough."""
        self._window += 1
        versions = {replica: report.arms[arm].version for replica, arm in arms.items()}
        await self._swaps.show_each(versions, draft_training_window=self._window)
        begun_s = time.monotonic()
        await asyncio.sleep(report.plan.window_s)
        while True:
            committed, seconds = await self._committed(self._window), time.monotonic() - begun_s
            turns: dict[int, Turn] = {}
            for replica, arm in arms.items():
                turn = Turn(window=self._window, seconds=seconds, committed=committed[replica])
                turns[arm] = turns[arm] + turn if arm in turns else turn
            if all(sum(turn.counted) >= report.plan.min_passes for turn in turns.values()):
                return turns
            await asyncio.sleep(_LOOK_S)

    async def _committed(self, window: int) -> dict[int, list[Histogram]]:
        """By replica, and of each by standing."""
        ranks = [rank for rank in await self._swaps.ranks() if rank["export"]]
        if failures := [rank["export"]["failure"] for rank in ranks if rank["export"].get("failure")]:
            raise RuntimeError(f"acceptance is not counted any more: {failures[0]}")
        seen: dict[int, list[list[Histogram]]] = {}
        for rank in ranks:
            of_window = rank["export"]["committed_by_window"].get(str(window), [[] for _ in Standing])
            seen.setdefault(rank["bank"]["replica"], []).append(of_window)
        return {replica: [add_up(pair) for pair in zip(*found, strict=True)] for replica, found in seen.items()}

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


def _sum_up(report: Report) -> None:
    for place, arm in enumerate(report.arms):
        turns = [block[place] for block in report.blocks if block[place]]
        counted = summary(turn.counted for turn in turns)
        arm.passes, arm.acceptance_length = counted["passes"], counted["length"]
        tokens = sum(summary(turn.committed)["tokens"] for turn in turns)
        arm.tokens_per_s = tokens / sum(turn.seconds for turn in turns)
        if place in report.judgement.out and arm.out_after_blocks is None:
            arm.out_after_blocks = len(turns)


def _in_words(report: Report) -> str:
    blocks = f"after {len(report.blocks)} blocks"
    if report.winner is not None:
        return f"version {report.winner} commits most tokens a verification ({report.outcome}), {blocks}"
    if report.outcome == "alike":
        return f"no difference of {report.plan.smallest_difference:.1%} or more, {blocks}"
    return f"undecided {blocks}"
