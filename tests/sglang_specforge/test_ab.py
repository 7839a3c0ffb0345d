"""When an A/B says that drafts differ, and how often it is wrong."""

import math
import random

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from sglang_specforge.ab.comparison import Turn, judge
from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.sequential import always_valid_interval
from sglang_specforge.export.acceptance import Standing, summary
from sglang_specforge.export.admission import CARRIED_OVER_PASSES, Admitted


def turn(length, fresh=0.0, tokens_per_s=100.0):
    """Of 1000 settled verifications, and as many of fresh requests where ``fresh`` is their acceptance length."""

    def histogram(length):
        twos = round(1000 * (length - 1))
        return [0, 1000 - twos, twos]

    committed = [[], histogram(length), histogram(fresh) if fresh else []]
    return Turn(window=1, seconds=summary(committed)["tokens"] / tokens_per_s, committed=committed)


def test_the_interval_is_the_set_of_means_that_the_sequential_t_test_keeps():
    values, alpha = [0.3, 0.5, 0.2, 0.4, 0.6, 0.1, 0.35], 0.05
    found = always_valid_interval(values, alpha)
    n, g = len(values), 1.0

    def bayes_factor(mean):
        """Of its density under either hypothesis: t is noncentral given the effect, which is N(0, g)."""
        t = stats.ttest_1samp(values, mean).statistic
        effects = np.linspace(-12, 12, 20_001)
        ratio = np.exp(stats.nct.logpdf(t, n - 1, effects * math.sqrt(n)) - stats.t.logpdf(t, n - 1))
        return np.trapezoid(ratio * stats.norm.pdf(effects, scale=math.sqrt(g)), effects)

    for bound in (found.low, found.high):
        assert bayes_factor(bound) == pytest.approx(1 / alpha, rel=1e-3)
    assert bayes_factor(found.mean) < 1


def test_with_too_few_values_nothing_is_said():
    assert always_valid_interval([1.0], 0.05)[1:] == (-math.inf, math.inf)
    assert always_valid_interval([1.0, 1.1], 0.05)[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize("shape", ["normal", "heavy tails"])
def test_looking_after_every_block_finds_no_difference_between_equals_in_95_of_100_runs(shape):
    draws, alarms = np.random.default_rng(0), 0
    for _ in range(2000):
        values = draws.normal(size=60) if shape == "normal" else draws.standard_t(4, size=60)
        alarms += any(
            not interval.low <= 0 <= interval.high
            for interval in (always_valid_interval(values[:n].tolist(), 0.05) for n in range(2, 61))
        )
    assert alarms <= 100


def noisy_blocks(lengths, blocks, seed=0):
    draws = random.Random(seed)
    return [[turn(length + draws.gauss(0, 0.02), fresh=length) for length in lengths] for _ in range(blocks)]


def test_a_better_draft_wins_and_its_gain_is_within_the_bounds():
    judgement = judge(noisy_blocks([1.5, 1.6], 30), 2, Plan(arms=[1, 2]))
    assert (judgement.outcome, judgement.winner, judgement.out) == ("better", 1, [0])
    found = judgement.pairs[0].acceptance_length
    assert found.blocks == 30
    assert 0 < found.low < 1.6 / 1.5 - 1 < found.high


def test_a_worse_draft_loses_against_the_first_arm():
    judgement = judge(noisy_blocks([1.6, 1.5], 30), 2, Plan(arms=[1, 2]))
    assert (judgement.outcome, judgement.winner) == ("worse", 0)


def test_equal_drafts_are_alike_once_no_difference_that_matters_is_left():
    plan = Plan(arms=[1, 2], smallest_difference=0.05)
    assert judge(noisy_blocks([1.5, 1.5], 3), 2, plan).outcome is None
    assert judge(noisy_blocks([1.5, 1.5], 30), 2, plan).outcome == "alike"


def test_of_several_arms_the_worst_go_first():
    blocks = noisy_blocks([1.5, 1.2, 1.52], 8)
    judgement = judge(blocks, 3, Plan(arms=[1, 2, 3], smallest_difference=0.005))
    assert (judgement.out, judgement.outcome) == ([1], None)
    rest = [[a, None, c] for a, _, c in noisy_blocks([1.5, 1.2, 1.52], 60, seed=1)]
    judgement = judge([*blocks, *rest], 3, Plan(arms=[1, 2, 3]))
    assert (judgement.out, judgement.winner) == ([0, 1], 2)
    assert [pair.acceptance_length.blocks for pair in judgement.pairs] == [8, 68, 8]


def test_a_block_without_fresh_requests_counts_for_the_rest():
    blocks = [[turn(1.5), turn(1.5, fresh=1.4)]]
    pair = judge(blocks, 2, Plan(arms=[1, 2])).pairs[0]
    assert (pair.acceptance_length.blocks, pair.acceptance_length_of_fresh_requests.blocks) == (1, 0)


def test_the_first_verifications_of_a_running_request_are_left_out_of_a_window():
    running, new = Admitted(None, None, 0.0), Admitted(None, None, 0.0)
    running.verify_in(0)
    standings = [running.verify_in(1) for _ in range(CARRIED_OVER_PASSES + 2)]
    assert standings == [Standing.CARRIED_OVER] * CARRIED_OVER_PASSES + [Standing.SETTLED] * 2
    new.enter(1)
    assert new.verify_in(1) is Standing.FRESH
    assert new.verify_in(2) is Standing.CARRIED_OVER


def test_a_summary_says_how_often_the_draft_was_right_at_each_depth():
    found = summary([[0, 2, 1, 1], [0, 2, 0, 0, 2]])
    assert found == {"passes": 8, "tokens": 17, "length": 17 / 8, "right_at_depth": [0.5, 0.375, 0.25]}
    assert summary([]) == {"passes": 0, "tokens": 0, "length": None, "right_at_depth": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"arms": [1]}, {"arms": [1, "best"]}, {"arms": [1, -2]}, {"arms": [1, 2], "window_s": 0},
        {"arms": [1, 2], "alpha": 0}, {"arms": [1, 2], "seed": -1}, {"arms": [1, 2], "windows": 3},
        {"arms": [1, 2], "window_s": math.inf},
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_is_refused(wrong):
    with pytest.raises(ValidationError):
        Plan.model_validate(wrong)
