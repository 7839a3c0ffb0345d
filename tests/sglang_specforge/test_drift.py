"""A fall of acceptance that no draft is to blame for is noticed soon, by name, and so is its end."""

import random

from sglang_specforge.drift import ALL, Drift, Ended, Move

LOOK_S = 2.0


class Server:
    """Counts of live acceptance that go on, and a clock."""

    def __init__(self, seed=0):
        self.drift = Drift(clock=lambda: self.now_s)
        self.now_s, self.version = 1000.0, 1
        self._draws, self._counts = random.Random(seed), {}

    def look(self, lengths, passes=200, noise=0.06):
        """Two seconds in which each slice (and all traffic) has this acceptance length."""
        self.now_s += LOOK_S
        for name, length in lengths.items():
            counts = self._counts.setdefault(name, {"passes": 0, "tokens": 0})
            counts["passes"] += passes
            counts["tokens"] += round(passes * (length + self._draws.gauss(0, noise)))
        return self.drift.look(self.version, {name: dict(counts) for name, counts in self._counts.items()})

    def looks(self, count, lengths, **about):
        return [found for _ in range(count) for found in self.look(lengths, **about)]


def test_a_fall_of_all_traffic_is_noticed_within_half_a_minute_and_so_is_its_end():
    server = Server()
    assert server.looks(30, {ALL: 2.4}) == []
    fell_s = server.now_s
    [move] = server.looks(15, {ALL: 1.9})
    assert isinstance(move, Move)
    assert (move.name, abs(move.since_s - fell_s) <= 2 * LOOK_S) == (ALL, True)
    assert abs(move.before - 2.4) < 0.1
    assert abs(server.drift.status()["moved"][ALL]["now"] - 1.9) < 0.1
    assert server.looks(60, {ALL: 1.9}) == []  # it is known
    server.version = 2
    [ended] = server.looks(15, {ALL: 2.35})
    assert isinstance(ended, Ended)
    assert server.drift.status()["moved"] == {}


def test_a_fall_right_after_what_is_usual_is_known_is_noticed_too():
    server = Server()
    assert server.looks(16, {ALL: 2.4}) == []
    assert [move.name for move in server.looks(15, {ALL: 1.9})] == [ALL]


def test_what_a_swap_leaves_behind_is_not_taken_for_usual():
    server = Server()
    assert server.looks(30, {ALL: 1.0}) == []
    server.version = 2
    for length in (1.2, 1.6, 2.0, 2.4):  # requests that began with the draft before end
        assert server.looks(1, {ALL: length}) == []
    assert server.looks(20, {ALL: 2.8}) == []
    assert [move.name for move in server.looks(6, {ALL: 2.2})] == [ALL]


def test_a_fall_too_small_to_matter_is_none_but_adds_up_to_one_that_is():
    server = Server()
    assert server.looks(30, {ALL: 2.4}, noise=0.01) == []
    assert server.looks(60, {ALL: 2.33}, noise=0.01) == []
    [move] = server.looks(15, {ALL: 2.2}, noise=0.01)
    assert abs(move.before - 2.4) < 0.05


def test_only_the_slice_that_fell_is_named():
    server = Server()
    assert server.looks(30, {ALL: 2.4, "code": 2.6, "chat": 2.2}) == []
    found = server.looks(15, {ALL: 2.4, "code": 2.0, "chat": 2.2})
    assert [move.name for move in found] == ["code"]


def test_traffic_that_stays_the_same_is_left_alone_for_hours():
    found = [event for seed in range(20) for event in Server(seed).looks(1800, {ALL: 2.4})]
    assert len(found) <= 1  # of twenty hours


def test_a_worse_draft_is_not_drift():
    server = Server()
    assert server.looks(30, {ALL: 2.4}) == []
    server.version = 2
    assert server.looks(60, {ALL: 1.5}) == []


def test_an_idle_server_and_counts_that_begin_anew_say_nothing():
    server = Server()
    assert server.looks(30, {ALL: 2.4}) == []
    assert [found for _ in range(100) for found in server.look({ALL: 1.0}, passes=0)] == []
    server._counts.clear()  # a slice that was forgotten for others, and is back
    assert server.looks(50, {ALL: 2.4}) == []


def test_a_slice_that_is_not_counted_any_more_is_forgotten():
    server = Server()
    assert server.looks(30, {ALL: 2.4, "code": 2.4}) == []
    assert len(server.looks(15, {ALL: 2.4, "code": 1.9})) == 1
    del server._counts["code"]
    [ended] = server.look({ALL: 2.4})
    assert ended == Ended("code", "no longer counted")
    assert server.drift.status()["levels"].keys() == {ALL}


def test_what_does_not_recover_is_what_is_usual_after_half_an_hour():
    server = Server()
    server.looks(30, {ALL: 2.4})
    found = server.looks(1000, {ALL: 1.9})
    assert [type(event) for event in found] == [Move, Ended]
    assert "not recovered" in found[1].why
