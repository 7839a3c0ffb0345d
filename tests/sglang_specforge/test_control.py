"""What becomes of the versions that a trainer announces."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq.asyncio

from sglang_specforge.checkpoint import content_of
from sglang_specforge.contracts import control
from sglang_specforge.control import ControlService
from sglang_specforge.new_draft import init_draft
from tests.sglang_specforge.test_swaps import Groups
from tests.tiny import make_run, make_target


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, make_target(tmp_path / "target"), trainer="none", drafting="always")


@pytest.fixture
def drafts(tmp_path):
    return [init_draft(str(tmp_path / "target"), tmp_path / f"d{i}", draft_vocab_size=32, seed=i) for i in range(1, 5)]


@asynccontextmanager
async def serving(run):
    """The service, and how a trainer announces a checkpoint; returns what is noted of that."""
    service = ControlService(run, Groups(replicas=1))
    task = asyncio.create_task(service.run())
    context = zmq.asyncio.Context()
    trainer = context.socket(zmq.PUSH)
    trainer.connect(run.control_endpoint)

    async def announce(checkpoint, verdict):
        before = len(service.swaps.audit.last(100))
        await trainer.send(control.encode(control.VersionReady(path=str(checkpoint), verdict=verdict)))
        while len(found := service.swaps.audit.last(100)[before:]) < 2:  # that it was added, and what became of it
            await asyncio.sleep(0.01)
        return found[1]

    try:
        yield service, announce
    finally:
        trainer.close(linger=0)
        context.term()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def passed(against):
    return control.Verdict(samples=9, gain=0.2, low=0.1, passed=True, why="better", against=content_of(against))


def test_what_somebody_chose_gives_way_only_to_what_was_compared_with_it(run, drafts):
    chosen, *published = drafts

    async def story():
        async with serving(run) as (service, announce):
            await service.swaps.activate(await service.swaps.add(chosen, "operator"), "operator")
            early = await announce(published[0], passed(against=Path(run.draft_path)))
            assert (early["event"], early["why"]) == (
                "held_back", "not compared with version 1, which is in service: better",
            )  # fmt: skip
            unjudged = await announce(published[1], None)
            assert (unjudged["event"], service.swaps.active) == ("held_back", 1)
            better = await announce(published[2], passed(against=chosen))
            assert (better["event"], better["who"], service.swaps.active) == ("activated", "trainer", 4)

    asyncio.run(story())


def test_what_the_trainer_put_there_gives_way_to_what_was_judged_before(run, drafts):
    async def story():
        async with serving(run) as (service, announce):
            for i, draft in enumerate(drafts[:2]):
                told = await announce(draft, passed(against=Path(run.draft_path)))
                assert (told["event"], service.swaps.active) == ("activated", i + 1)
            unjudged = await announce(drafts[2], None)
            assert (unjudged["event"], service.swaps.active) == ("activated", 3)

    asyncio.run(story())


def test_what_somebody_swaps_in_while_a_version_is_on_its_way_stays(run, drafts):
    chosen, published, _, _ = drafts

    async def story():
        async with serving(run) as (service, announce):
            swaps = service.swaps
            number = await swaps.add(chosen, "operator")
            load, on_its_way = swaps._load, asyncio.Event()

            async def load_slowly(version):
                if version != number and not on_its_way.is_set():
                    on_its_way.set()
                    swaps._manifest.activated(number, chosen=True)  # as somebody's change would, just before this one
                await load(version)

            swaps._load = load_slowly
            told = await announce(published, passed(against=Path(run.draft_path)))
            assert on_its_way.is_set()
            assert (told["event"], swaps.active) == ("held_back", number)

    asyncio.run(story())
