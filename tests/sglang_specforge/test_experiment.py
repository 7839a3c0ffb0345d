"""An A/B from its beginning to its end, with schedulers that only count."""

import asyncio
import random

import pytest

from sglang_specforge.ab.experiment import Experiments
from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.windows import Windows
from sglang_specforge.swaps import DraftHeld, Swaps
from tests.sglang_specforge.test_swaps import Groups
from tests.tiny import make_run, make_target

LENGTHS = {0: 1.2, 1: 1.6}  # acceptance length of each version


class Serving(Groups):
    """Under load: each look sees more verifications in the present window. The second replica has more traffic, whose
    drafts are accepted less."""

    def __init__(self, replicas):
        super().__init__(replicas=replicas)
        self.windows, self.shown, self._draws = [{} for _ in self.banks], [], random.Random(0)
        self.breaks = False

    @property
    def order(self):
        return [version for versions in self.shown for version in versions]

    async def set_state(self, **values):
        if window := values.pop("draft_training_window", None):
            self.shown.append([values[f"draft_training_activate_{i}"] for i in range(len(self.banks))])
            for i, version in enumerate(self.shown[-1]):
                passes = 100 * (1 + 4 * i)
                twos = round(passes * (LENGTHS[version] - 1 - 0.15 * i + self._draws.gauss(0, 0.02)))
                self.windows[i][str(window)] = [[], [0, passes - twos, twos], []]
        return await super().set_state(**values)

    async def get_states(self):
        if self.breaks and self.shown:
            raise ValueError("a scheduler answers nonsense")
        states = await super().get_states()
        for state, windows in zip(states, self.windows, strict=True):
            state["draft_training"]["export"] = {"committed_by_window": windows, "committed_by_version": {}}
        return states


@pytest.fixture
def story(tmp_path):
    """Runs a story with fresh swaps and experiments, and version 1 beside 0."""
    run = make_run(tmp_path, make_target(tmp_path / "target"))

    def tell(body, replicas=1):
        async def begin():
            serving = Serving(replicas)
            swaps = Swaps(run, serving)
            experiments = Experiments(swaps, Windows(swaps), run.run_dir / "ab")
            await swaps.add(tmp_path / "draft", "me")
            await body(serving, swaps, experiments)

        asyncio.run(begin())

    tell.folder = run.run_dir / "ab"
    return tell


def plan(**fields):
    return Plan(arms=["active", 1], window_s=0.1, seed=1, **fields)


async def ended(experiments, id):
    while (report := experiments.get(id)).state == "running":
        await asyncio.sleep(0.01)
    return report


def test_turns_are_taken_in_random_order_and_the_winner_is_promoted(story):
    async def body(serving, swaps, experiments):
        report = await ended(experiments, (await experiments.start(plan(promote=True), "me")).id)
        assert (report.state, report.outcome, report.winner, report.promoted) == ("ended", "better", 1, True)
        assert serving.banks[0]["active_version"] == swaps.active == 1
        blocks = [tuple(serving.order[i : i + 2]) for i in range(0, len(serving.order), 2)]
        assert set(blocks) == {(0, 1), (1, 0)}
        assert len(blocks) == len(report.blocks)
        assert swaps.holder is None

    story(body)


def test_replicas_serve_different_arms_at_a_time_and_each_serves_every_arm_in_every_block(story):
    async def body(serving, swaps, experiments):
        report = await ended(experiments, (await experiments.start(plan(promote=True), "me")).id)
        assert (report.outcome, report.winner) == ("better", 1)
        assert all(sorted(at_once) == [0, 1] for at_once in serving.shown)
        blocks = [serving.shown[i : i + 2] for i in range(0, len(serving.shown), 2)]
        assert all(sorted(of_one) == [0, 1] for block in blocks for of_one in zip(*block, strict=True))
        assert report.arms[0].passes == report.arms[1].passes == 600 * len(blocks)
        assert {bank["active_version"] for bank in serving.banks} == {swaps.active} == {1}

    story(body, replicas=2)


def test_without_promotion_the_draft_of_before_is_active_again(story):
    async def body(serving, swaps, experiments):
        report = await ended(experiments, (await experiments.start(plan(), "me")).id)
        assert (report.winner, report.promoted) == (1, False)
        assert serving.banks[0]["active_version"] == swaps.active == 0

    story(body)


def test_one_at_a_time_and_one_that_is_stopped_changes_nothing(story):
    async def body(serving, swaps, experiments):
        report = await experiments.start(plan(min_passes=1000), "me")  # never sees so many
        with pytest.raises(DraftHeld):
            await experiments.start(plan(), "me")
        stopped = await experiments.stop(report.id, "me")
        assert (stopped.state, stopped.why) == ("stopped", "stopped by me")
        assert serving.banks[0]["active_version"] == 0
        assert swaps.is_free.is_set()
        assert await experiments.stop(report.id, "me") == stopped

    story(body)


def test_whatever_goes_wrong_the_draft_is_let_go(story):
    async def body(serving, swaps, experiments):
        serving.breaks = True
        report = await ended(experiments, (await experiments.start(plan(), "me")).id)
        assert (report.state, report.why) == ("failed", "a scheduler answers nonsense")
        assert serving.banks[0]["active_version"] == 0
        assert swaps.holder is None

    story(body)


def test_a_server_that_ends_leaves_a_report_that_says_so(story):
    async def body(serving, swaps, experiments):
        report = await experiments.start(plan(max_blocks=10_000, smallest_difference=1e-6, alpha=1e-300), "me")
        while not report.blocks:
            await asyncio.sleep(0.01)
        experiments.abandon()
        await asyncio.sleep(0)
        (found,) = Experiments(swaps, Windows(swaps), story.folder).all()
        assert (found.state, found.why) == ("interrupted", "the server ended")
        assert found.blocks == report.blocks[: len(found.blocks)] != []

    story(body)
