"""A version that live traffic accepts less of is taken back, and one that is as good never is."""

import random

from sglang_specforge.guard import Cleared, Guard, Worse


class Traffic:
    """Of one version: each look sees 100 verifications more."""

    def __init__(self, length, seed=0):
        self._draws, self.length = random.Random(seed), length
        self.seen = {"passes": 0, "tokens": 0}

    def more(self, passes=100):
        self.seen["passes"] += passes
        self.seen["tokens"] += round(passes * (self.length + self._draws.gauss(0, 0.05)))
        return dict(self.seen)


def looks(guard, version, traffic, count=50):
    """Of so many looks, the first that finds something, and which one it was."""
    found = ((i, guard.look(version, traffic.more())) for i in range(count))
    return next(((i, finding) for i, finding in found if finding), None)


def test_a_worse_version_is_found_out_within_a_minute_of_looks():
    guard = Guard()
    assert looks(guard, 1, Traffic(1.8), 20) is None
    at, found = looks(guard, 2, Traffic(1.2))
    assert at < 15
    assert isinstance(found, Worse) and found.version == 2
    assert found.why.startswith("acceptance length 1.")
    assert "of the version before 1." in found.why
    assert looks(guard, 1, Traffic(1.8)) is None  # rightly


def test_a_version_is_cleared_where_the_one_before_it_does_no_better_then():
    guard = Guard()
    assert looks(guard, 1, Traffic(1.8), 20) is None
    newer = Traffic(1.9)
    assert looks(guard, 2, newer, 10) is None
    newer.length = 1.2  # the traffic has changed
    _, found = looks(guard, 2, newer)
    assert isinstance(found, Worse)
    at, cleared = looks(guard, 1, Traffic(1.15))
    assert isinstance(cleared, Cleared) and cleared.suspect.version == 2
    assert at < 10
    assert looks(guard, 2, newer) is None  # the other is the measure from now on


def test_nobody_is_cleared_where_the_rollback_failed_or_something_else_went_live():
    for next_version in (2, 3):
        guard = Guard()
        assert looks(guard, 1, Traffic(1.8), 20) is None
        assert isinstance(looks(guard, 2, Traffic(1.2))[1], Worse)
        if next_version == 3:
            assert looks(guard, 1, Traffic(1.2), 3) is None
        assert not isinstance(looks(guard, next_version, Traffic(1.2)), Cleared)


def test_versions_that_are_as_good_stay():
    for seed in range(200):
        guard = Guard()
        assert looks(guard, 1, Traffic(1.8, seed), 20) is None
        assert looks(guard, 2, Traffic(1.8, 1000 + seed)) is None


def test_a_better_version_stays_and_is_the_measure_of_the_next():
    guard = Guard()
    assert looks(guard, 1, Traffic(1.2), 20) is None
    assert looks(guard, 2, Traffic(1.8), 20) is None
    assert looks(guard, 3, Traffic(1.2)) is not None


def test_without_enough_of_the_version_before_nothing_is_said():
    guard = Guard()
    assert looks(guard, 1, Traffic(1.8), 3) is None
    assert looks(guard, 2, Traffic(1.2)) is None
    guard.forget()
    assert looks(guard, 3, Traffic(1.0)) is None


def test_an_idle_server_says_nothing():
    guard, traffic = Guard(), Traffic(1.8)
    assert looks(guard, 1, traffic, 20) is None
    still = Traffic(1.0)
    assert all(guard.look(2, still.more(passes=0)) is None for _ in range(100))
    assert guard.look(2, None) is None
