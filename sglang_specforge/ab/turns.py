"""The main loop of an A/B: blocks, in which every place serves with every arm once, until the comparison is settled."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, Protocol

from sglang_specforge.ab.comparison import Block, Turn
from sglang_specforge.ab.report import Report

_LOOK_S = 0.5

Place = Any  # a replica's number, or a server's address


class Stage(Protocol):
    """Where drafts serve at the same time: the replicas of a server, or several servers."""

    async def places(self) -> list[Place]: ...

    async def open(self, versions: dict[Place, int]) -> None:
        """Begin a window with a version on each place."""

    async def look(self) -> dict[Place, Turn]:
        """What each place has seen in the window so far."""


async def compare(report: Report, stage: Stage, save: Callable[[Report], None]) -> None:
    """Until it is settled, or all blocks are over; the report is saved after each block."""
    plan, draws = report.plan, random.Random(report.plan.seed)
    for _ in range(plan.max_blocks):
        order = [arm for arm in range(len(report.arms)) if arm not in report.judgement.out]
        draws.shuffle(order)
        report.add(await _take_turns(report, stage, order))
        save(report)
        if report.judgement.outcome:
            break
    report.conclude()


async def _take_turns(report: Report, stage: Stage, order: list[int]) -> Block:
    """Each place serves with every arm once, in this order, and each begins at another place of it: arms are compared
    at the same time, and the load of a place falls on all of them."""
    places = await stage.places()
    block: Block = [None] * len(report.arms)
    for shift in range(len(order)):
        arms = {place: order[(i + shift) % len(order)] for i, place in enumerate(places)}
        for arm, turn in (await _take_window(report, stage, arms)).items():
            block[arm] = block[arm] + turn if block[arm] else turn
    return block


async def _take_window(report: Report, stage: Stage, arms: dict[Place, int]) -> dict[int, Turn]:
    """Serve with an arm on each place until the window is long enough, and each arm has seen enough."""
    await stage.open({place: report.arms[arm].version for place, arm in arms.items()})
    await asyncio.sleep(report.plan.window_s)
    while True:
        turns: dict[int, Turn] = {}
        for place, turn in (await stage.look()).items():
            arm = arms[place]
            turns[arm] = turns[arm] + turn if arm in turns else turn
        if all(sum(turn.counted) >= report.plan.min_passes for turn in turns.values()):
            return turns
        await asyncio.sleep(_LOOK_S)
