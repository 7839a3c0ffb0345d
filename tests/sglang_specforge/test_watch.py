"""What follows from live acceptance: a version is taken back, or put back where the traffic was to blame."""

import asyncio
from types import SimpleNamespace

import pytest

from sglang_specforge.watch import Watch


class Swaps:
    """A server's, with counts of live acceptance: each look sees 200 verifications of the active version."""

    holder = None

    def __init__(self, lengths, gate="auto"):
        self.lengths, self.gate, self.active, self.moved, self.told = lengths, gate, 1, {}, []
        self.audit = SimpleNamespace(write=lambda event, who, **facts: self.told.append((event, who)))
        self._by_version = {}

    async def roll_back(self, who, why):
        self.told.append(("rolled_back", who))
        self.active, self.gate = self.active - 1, "propose"

    async def activate(self, version, who, why):
        self.told.append(("activated", who))
        self.active = version

    def set_gate(self, mode, who, why):
        self.gate = mode

    def set_moved(self, moved):
        self.moved = moved

    def ranks(self):
        counts = self._by_version.setdefault(str(self.active), [0, 0, 0])
        twos = round(200 * (self.lengths[self.active] - 1))
        counts[1], counts[2] = counts[1] + 200 - twos, counts[2] + twos
        total = [sum(column) for column in zip(*self._by_version.values(), strict=True)]
        export = {"committed": total, "committed_by_version": self._by_version, "committed_by_slice": {}}
        return [{"bank": {"active_version": self.active}, "export": export}]


def look(watch, swaps, times):
    for _ in range(times):
        asyncio.run(watch.look(swaps.ranks()))


@pytest.fixture
def watched():
    """Version 2 has just come after version 1."""
    swaps = Swaps({1: 1.6, 2: 1.7})
    watch = Watch(swaps)
    look(watch, swaps, 10)
    swaps.active = 2
    look(watch, swaps, 3)
    assert swaps.told == []
    return watch, swaps


def test_a_worse_version_is_taken_back_and_stays_out(watched):
    watch, swaps = watched
    swaps.lengths[2] = 1.2
    look(watch, swaps, 40)
    assert swaps.told == [("rolled_back", "guard")]
    assert (swaps.active, swaps.gate) == (1, "propose")
    assert swaps.moved == {}


def test_trials_of_a_draft_that_does_not_draft_are_no_measure_of_it(watched):
    watch, swaps = watched
    swaps.lengths[2] = 1.2
    for _ in range(40):
        asyncio.run(watch.look(swaps.ranks(), drafting=False))
    look(watch, swaps, 40)
    assert swaps.told == []


def test_a_version_is_put_back_where_the_one_before_does_no_better_and_that_is_drift(watched):
    watch, swaps = watched
    swaps.lengths = {1: 1.15, 2: 1.2}
    look(watch, swaps, 40)
    assert swaps.told == [("rolled_back", "guard"), ("drift", "server"), ("activated", "guard")]
    assert (swaps.active, swaps.gate) == (2, "auto")
    assert swaps.moved[""] > 0
    swaps.lengths[2] = 1.7
    look(watch, swaps, 10)
    assert swaps.told[-1] == ("drift_over", "server")
    assert swaps.moved == {}


def test_during_an_ab_nothing_is_said(watched):
    watch, swaps = watched
    swaps.holder, swaps.lengths[2] = "ab/1", 1.1
    look(watch, swaps, 40)
    assert swaps.told == []
