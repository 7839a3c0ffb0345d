"""What a pass takes, and what it takes when the draft is swapped before it."""

from sglang_specforge.export.pace import Pace


def count(pace, version, seconds, passes=1):
    for _ in range(passes):
        pace.count(version, True, 4, seconds, [2, 3])


def test_a_pass_with_a_swap_is_told_in_medians_of_those_without():
    pace = Pace()
    count(pace, 1, 0.010, passes=20)
    count(pace, 2, 0.013)
    count(pace, 2, 0.010, passes=3)
    count(pace, 1, 0.012)
    steps = pace.swap_steps()
    assert steps["timed"] == 2
    assert abs(steps["longest_to_median"] - 1.3) < 1e-9
    assert pace.status()["drafted"]["4"][0] == 25


def test_a_swap_in_a_pass_that_was_not_timed_is_not_put_down_to_the_next_one():
    pace = Pace()
    count(pace, 1, 0.010, passes=20)
    count(pace, 2, None)  # a prompt came in between
    count(pace, 2, 0.5)
    assert pace.swap_steps()["timed"] == 0


def test_without_enough_passes_to_compare_with_nothing_is_said():
    pace = Pace()
    count(pace, 1, 0.010)
    count(pace, 2, 0.5)
    assert pace.swap_steps()["timed"] == 0
