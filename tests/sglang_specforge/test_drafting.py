"""Drafting goes on where it pays and stays off where it costs, and nobody else's business is disturbed by a trial."""

import asyncio
from types import SimpleNamespace

import pytest

from sglang_specforge import drafting
from sglang_specforge.drafting import Depth, DraftingFixed, Governor, compare
from sglang_specforge.export import pace
from sglang_specforge.swaps import NotAttached

ASLEEP_S, WARM_S, ON_S = 0.010, 0.011, 0.020  # of a pass: the break-even is 2 (1.82 beside a warm draft)


class Server:
    """Its draft's acceptance length is ``length``; between two looks it makes ``passes`` passes of 4 requests."""

    def __init__(self, length, passes=50):
        self.length, self.passes, self.depth, self.told, self.events = length, passes, Depth.WARM, [], []
        self.holder, self.active, self.broken, self.drafting = None, 0, False, "auto"
        self.audit = SimpleNamespace(write=lambda event, who, **facts: self.events.append(event))
        self._pace = {"drafted": {}, "undrafted": {}}

    def set_drafting(self, mode, who, why):
        self.drafting = mode
        self.events.append(f"drafting_mode {mode}")

    async def set_state(self, draft_training_drafting):
        self.depth = Depth(draft_training_drafting)
        self.told.append(self.depth)

    async def ranks(self):
        if self.broken:
            raise NotAttached
        on = self.depth is Depth.ON
        counts = self._pace["drafted" if on else "undrafted"].setdefault("4", [0, 0.0, 0, 0])
        seconds = {Depth.ASLEEP: ASLEEP_S, Depth.WARM: WARM_S, Depth.ON: ON_S}[self.depth]
        more = (1, seconds, 4, 4 * (self.length if on else 1))
        counts[:] = [have + self.passes * one for have, one in zip(counts, more, strict=True)]
        return [{"export": {"pace": {kind: {s: list(c) for s, c in by.items()} for kind, by in self._pace.items()}}}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("_LOOK_EVERY_S", "_TURN_S", "_LONGEST_TURN_S", "_WARM_UP_S", "_SOON_S", "_LATER_S"):
        monkeypatch.setattr(drafting, name, 0.001)
    monkeypatch.setattr(drafting, "_MAY_COST", 1.0)


def govern(server, until, promised=lambda: None, governor=None):
    """Until ``until(governor)`` is true, or for ever."""

    async def story():
        task = asyncio.create_task(one.run(promised))
        async with asyncio.timeout(5):
            while not until(one):
                await asyncio.sleep(0.001)
        task.cancel()

    one = governor or Governor(server, server)
    asyncio.run(story())
    return one


def trials(count):
    return lambda governor: governor.status()["trials"] >= count


def test_a_draft_that_is_rarely_right_is_put_to_sleep_and_the_break_even_is_told():
    server = Server(length=1.02)
    status = govern(server, trials(3)).status()
    assert set(server.told) == {Depth.ON, Depth.ASLEEP, Depth.WARM}
    assert server.events == ["drafting_off"]
    assert status["break_even_length"] == pytest.approx(ON_S / ASLEEP_S)
    assert status["gain"] == pytest.approx(1.02 * ASLEEP_S / ON_S)


def test_drafting_goes_on_when_the_draft_has_learnt_and_off_when_the_traffic_has_changed():
    server = Server(length=1.02)
    governor = govern(server, trials(2))
    server.length = 2.5
    govern(server, lambda g: g.status()["depth"] == "on" and server.events[-1] == "drafting_on", governor=governor)
    server.length = 1.2
    govern(server, lambda _: server.events[-1] == "drafting_off", governor=governor)
    assert server.events == ["drafting_off", "drafting_on", "drafting_off"]


def test_the_draft_s_cache_is_kept_whole_where_drafting_may_soon_pay():
    near = Server(length=1.7)
    assert govern(near, trials(3)).status()["depth"] in ("warm", "on")  # on: within a trial
    assert Depth.ASLEEP not in near.told
    # Requests that were served asleep hold acceptance down; the held-out samples know better.
    promising = Server(length=1.1)
    govern(promising, trials(3), promised=lambda: 2.4)
    assert Depth.ASLEEP not in promising.told


def test_a_new_version_that_promises_too_little_is_not_tried_at_once(monkeypatch):
    server = Server(length=1.02)
    governor = govern(server, trials(1), promised=lambda: 1.1)
    monkeypatch.setattr(drafting, "_LATER_S", 60)
    govern(server, trials(2), promised=lambda: 1.1, governor=governor)
    looks = iter(range(50))
    server.active = 1
    govern(server, lambda _: next(looks, None) is None, promised=lambda: 1.1, governor=governor)
    assert governor.status()["trials"] == 2
    server.active = 2
    govern(server, trials(3), promised=lambda: 2.0, governor=governor)


def test_a_trial_is_not_made_again_before_what_it_lost_is_made_up_for(monkeypatch):
    monkeypatch.setattr(drafting, "_MAY_COST", 1e-6)
    server, looks = Server(length=1.02), iter(range(50))
    governor = govern(server, trials(1))
    govern(server, lambda _: next(looks, None) is None, governor=governor)
    assert governor.status()["trials"] == 1
    server.active = 1  # a draft of which nobody knows that it is as bad
    govern(server, trials(2), governor=governor)


def test_whoever_holds_the_draft_has_it_drafting_all_the_time():
    server = Server(length=1.02)
    governor = govern(server, trials(2))
    server.holder = "ab/1"
    govern(server, lambda _: server.told[-1] is Depth.ON, governor=governor)
    told, looks = len(server.told), iter(range(50))
    govern(server, lambda _: next(looks, None) is None, governor=governor)
    assert len(server.told) <= told + 1  # a trial that had begun was ended
    assert server.depth is Depth.ON


def test_nothing_is_tried_without_traffic():
    server, looks = Server(length=1.02, passes=0), iter(range(50))
    assert govern(server, lambda _: next(looks, None) is None).status()["trials"] == 0
    assert Depth.ON not in server.told


def test_schedulers_that_fail_within_a_trial_are_told_again_what_was_before():
    server = Server(length=1.02)
    governor = govern(server, trials(1))
    govern(server, lambda _: server.depth is Depth.ON, governor=governor)
    server.broken = True
    govern(server, lambda _: server.depth is Depth.ASLEEP, governor=governor)


def test_the_mode_can_be_changed_where_the_server_can_switch_drafting_off():
    server = Server(length=1.02)
    governor = govern(server, trials(1))
    governor.set_mode("always", "me")
    govern(server, lambda _: server.depth is Depth.ON, governor=governor)
    governor.set_mode("never", "me")
    govern(server, lambda _: server.depth is Depth.ASLEEP, governor=governor)
    assert server.events[-2:] == ["drafting_mode always", "drafting_mode never"]
    with pytest.raises(DraftingFixed, match="--draft-drafting auto"):
        Governor(server, server, fixed=True).set_mode("never", "me")


def test_only_batch_sizes_that_both_had_are_compared():
    on = {"4": [30, 30 * 0.02, 120, 240], "8": [10, 10 * 0.5, 80, 80]}
    off = {"4": [90, 90 * 0.01, 360, 360], "2": [50, 1.0, 100, 100]}
    found = compare(on, off)
    assert (found.gain, found.length, found.break_even) == pytest.approx((1.0, 2.0, 2.0))
    assert compare(on, {"8": off["4"]}) is None  # too few passes of 8


def test_only_a_pass_that_follows_one_of_its_kind_is_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock) / 10)
    found = pace.Pace()
    laps = [found.lap(True, 5), found.lap(True, 7), found.lap(True, 9), found.lap(False, 9), found.lap(False, 9)]
    assert laps == [None, pytest.approx(0.1), None, None, pytest.approx(0.1)]
    found.interrupt()
    assert found.lap(False, 9) is None
    for _ in range(20):
        next(clock)
    assert found.lap(False, 9) is None  # a pause
    found.count(0, True, 7, 0.1, [1, 3])
    found.count(0, True, 8, 0.1, [2])
    assert found.status() == {"drafted": {"8": [2, pytest.approx(0.2), 3, 6]}, "undrafted": {}}
