"""All ranks change to a version or none does; who may change it; what is written down."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from sglang_specforge.checkpoint import FINGERPRINT_KEY, CheckpointError, content_of, load_config
from sglang_specforge.manifest import Manifest
from sglang_specforge.new_draft import init_draft
from sglang_specforge.settings import Run
from sglang_specforge.swaps import DraftHeld, Overtaken, SwapRefused, Swaps, UnknownVersion
from tests.tiny import make_run, make_target


class Groups:
    """The schedulers of several replicas, each with its bank; ``refusing`` says which version a replica cannot load."""

    def __init__(self, active=0, replicas=2, refusing=None, never_ready=()):
        self.banks = [
            {
                "replica": i,
                "active_version": active,
                "active_since_step": 0,
                "resident_versions": [active],
                "refused": {},
            }
            for i in range(replicas)
        ]
        self.refusing, self.never_ready = refusing or {}, set(never_ready)

    async def get_states(self):
        return [{"draft_training": {"bank": bank, "export": None}} for bank in self.banks]

    async def set_state(self, **values):
        return all([all(self._apply(i, key, value) for key, value in values.items()) for i in range(len(self.banks))])

    def _apply(self, i, key, version):
        bank = self.banks[i]
        resident = bank["resident_versions"]
        match key.removeprefix("draft_training_"):
            case "load" if self.refusing.get(i) == version:
                bank["refused"][str(version)] = f"replica {i} has no memory"
            case "load":
                bank["resident_versions"] = sorted({*resident, version})
            case "evict":
                bank["resident_versions"] = [v for v in resident if v != version]
            case "prepare":
                return version in resident and i not in self.never_ready
            case order if order in ("activate", f"activate_{i}"):
                bank["active_version"], bank["active_since_step"] = version, 5
        return True


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path, make_target(tmp_path / "target"))


@pytest.fixture
def drafts(tmp_path):
    return [init_draft(str(tmp_path / "target"), tmp_path / f"d{i}", draft_vocab_size=32, seed=i) for i in range(1, 6)]


def active(groups):
    return {bank["active_version"] for bank in groups.banks}


def events(swaps):
    return [event["event"] for event in swaps.audit.last(100)]


def test_a_rollback_is_not_undone_by_what_the_trainer_had_published_before_it(run, drafts):
    async def story():
        groups = Groups()
        swaps = Swaps(run, groups)
        first, second = [await swaps.add(draft, "trainer") for draft in drafts[:2]]
        await swaps.activate(first, "trainer", if_still=lambda: swaps.gate == "auto")
        rolling = asyncio.create_task(swaps.roll_back("me", "worse"))
        waiting = asyncio.create_task(swaps.activate(second, "trainer", if_still=lambda: swaps.gate == "auto"))
        assert await rolling == (first, 0)
        with pytest.raises(Overtaken, match="version 0 is in service, and the gate at 'propose'"):
            await waiting
        assert active(groups) == {0}
        await swaps.activate(second, "me")
        assert active(groups) == {second}

    asyncio.run(story())


def test_a_version_is_activated_rolled_back_and_the_log_tells(run, drafts):
    async def story():
        groups = Groups()
        swaps = Swaps(run, groups)
        first, second = [await swaps.add(draft, "me") for draft in drafts[:2]]
        assert await swaps.activate(first, "me") == (0, first)
        assert await swaps.activate(first, "me") == (first, first)
        assert await swaps.activate(second, "me", "better") == (first, second)
        assert await swaps.roll_back("me", "worse") == (second, first)
        assert active(groups) == {first}
        assert swaps.gate == "propose"
        assert events(swaps) == ["added", "added", "activated", "activated", "rolled_back", "gate"]
        assert (
            swaps.audit.last(2)[0].items()
            >= {"who": "me", "before": 2, "version": 1, "why": "worse", "step": 5}.items()
        )
        swaps.set_drafting("never", "me")
        swaps.set_drafting("never", "me")  # no change, no event
        assert events(swaps)[-2:] == ["gate", "drafting_mode"]
        restarted = Manifest.load(swaps.versions.root)
        assert (restarted.active, restarted.gate, restarted.drafting) == (first, "propose", "never")

    asyncio.run(story())


def test_another_trainers_draft_is_taken_in_once_and_one_that_does_not_fit_is_named(run, drafts):
    config = load_config(drafts[0])
    del config[FINGERPRINT_KEY]
    (drafts[0] / "config.json").write_text(json.dumps(config))
    (drafts[1] / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))

    async def story():
        swaps = Swaps(run, Groups())
        assert [await swaps.add(drafts[0], "me") for _ in range(2)] == [1, 1]
        assert load_config(swaps.path(1))[FINGERPRINT_KEY] == run.target_fingerprint
        assert swaps.audit.last(1)[0]["path"] == str(drafts[0])
        with pytest.raises(CheckpointError, match=rf"{drafts[1]}: tensor .* has shape"):
            await swaps.add(drafts[1], "me")
        with pytest.raises(CheckpointError, match="architecture 'LlamaForCausalLM'"):
            await swaps.add(run_target := Path(run.target_path), "me")
        assert run_target.exists()
        assert swaps.known_versions() == [0, 1]
        assert not list((run.run_dir / "uploads").iterdir())

    asyncio.run(story())


def test_a_restarted_server_goes_back_to_the_draft_that_the_first_one_started_with(run, drafts):
    initial = shutil.copytree(run.draft_path, run.run_dir / "versions" / "initial")
    run = run.model_copy(update={"draft_path": str(initial)})

    async def story():
        swaps = Swaps(run, Groups())
        later = await swaps.add(drafts[0], "me")
        await swaps.activate(later, "me")
        for _ in range(2):  # once more: it has its number already
            begun_later = {"draft_version": later, "draft_path": str(swaps.path(later))}
            swaps = Swaps(run.model_copy(update=begun_later), Groups(active=later))
            assert swaps.known_versions() == [later, later + 1]
        change = await swaps.roll_back("me")
        assert change == (later, later + 1)
        assert content_of(swaps.path(change.version)) == content_of(initial)
        assert events(swaps) == ["added", "activated", "added", "rolled_back", "gate"]

    asyncio.run(story())


def test_a_replica_that_cannot_load_leaves_all_on_the_old_version(run, drafts):
    async def story():
        groups = Groups(refusing={1: 1})
        swaps = Swaps(run, groups)
        version = await swaps.add(drafts[0], "me")
        with pytest.raises(SwapRefused, match="replica 1 has no memory"):
            await swaps.activate(version, "me")
        assert active(groups) == {0}
        assert [bank["resident_versions"] for bank in groups.banks] == [[0], [0]]
        assert events(swaps) == ["added", "refused"]
        assert swaps.active == 0

    asyncio.run(story())


def test_a_replica_that_never_says_that_it_has_the_version_is_not_waited_for_for_ever(run, drafts, monkeypatch):
    monkeypatch.setattr("sglang_specforge.swaps._LOAD_LIMIT_S", 0.5)

    async def story():
        groups = Groups(never_ready=[1])
        swaps = Swaps(run, groups)
        version = await swaps.add(drafts[0], "me")
        with pytest.raises(SwapRefused, match="not loaded on every rank"):
            await swaps.activate(version, "me")
        assert active(groups) == {0}
        assert version in swaps.failed

    asyncio.run(story())


def test_the_bank_keeps_what_is_needed_and_forgets_the_longest_unused(run, drafts):
    async def story():
        groups = Groups()
        swaps = Swaps(run, groups)  # three slots
        for draft in drafts[:3]:
            await swaps.activate(await swaps.add(draft, "me"), "me")
        assert groups.banks[0]["resident_versions"] == [1, 2, 3]
        await swaps.load(await swaps.add(drafts[3], "me"))
        assert groups.banks[0]["resident_versions"] == [2, 3, 4]
        await swaps.hold("ab/1", [2, 3, 4])
        fifth = await swaps.add(drafts[4], "me")
        with pytest.raises(SwapRefused, match="--draft-bank-slots"):
            await swaps.load(fifth)
        assert groups.banks[0]["resident_versions"] == [2, 3, 4]
        swaps.let_go()
        await swaps.load(fifth)
        assert groups.banks[0]["resident_versions"] == [2, 3, 5]

    asyncio.run(story())


def test_who_holds_the_draft_decides_alone(run, drafts):
    async def story():
        swaps = Swaps(run, Groups())
        version = await swaps.add(drafts[0], "me")
        await swaps.hold("ab/1", [0, version])
        for change in (swaps.activate(version, "me"), swaps.roll_back("me", to=version), swaps.hold("ab/2", [0])):
            with pytest.raises(DraftHeld, match="DELETE /draft/ab/1"):
                await change
        assert await swaps.activate(version, "ab/1") == (0, version)
        swaps.let_go()
        assert await swaps.activate(0, "me") == (version, 0)

    asyncio.run(story())


def test_unknown_versions_and_a_rollback_from_the_first_are_refused(run):
    async def story():
        swaps = Swaps(run, Groups())
        with pytest.raises(UnknownVersion, match="there is no draft version 7; there are 0"):
            await swaps.activate(7, "me")
        with pytest.raises(SwapRefused, match="none to go back to"):
            await swaps.roll_back("me")

    asyncio.run(story())


def test_what_was_added_by_hand_is_not_deleted_for_newer_ones(run, drafts):
    async def story():
        swaps = Swaps(run, Groups())
        added = await swaps.add(drafts[0], "me")
        for draft in drafts[1:]:
            await swaps.add(draft, "trainer")
        assert swaps.known_versions() == [0, added, 3, 4, 5]  # three are kept of the others

    asyncio.run(story())


def test_a_disk_that_takes_no_note_does_not_stop_a_change(run, drafts, caplog):
    async def story():
        swaps = Swaps(run, Groups())
        version = await swaps.add(drafts[0], "me")
        for file in (run.run_dir / "audit.jsonl", swaps.versions.root / "manifest.json"):
            file.unlink()
            file.mkdir()
        assert await swaps.activate(version, "me") == (0, version)
        assert "audit.jsonl takes no line" in caplog.text
        assert "what is active cannot be noted" in caplog.text

    asyncio.run(story())
