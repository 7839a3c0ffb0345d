"""A candidate goes live only where it is better beyond chance, and no slice pays for it."""

import random

import pytest

from trainer.evaluate import Simulated
from trainer.gate import compare


def judged(lengths, slices=None):
    """Samples of 100 verifications each, with these acceptance lengths."""
    slices = slices or [""] * len(lengths)
    return [
        (name, Simulated(round(100 * length) + 1, 1, 100.0, [0.0]))
        for name, length in zip(slices, lengths, strict=True)
    ]


def noisy(mean, samples, seed, spread=0.3):
    draws = random.Random(seed)
    return [mean + spread * draws.random() for _ in range(samples)]


def test_a_candidate_that_is_better_on_every_sample_passes_however_much_the_samples_differ():
    served = noisy(1.2, 12, seed=0, spread=1.5)
    gained = noisy(0.05, 12, seed=1, spread=0.05)
    verdict = compare(judged([a + b for a, b in zip(served, gained, strict=True)]), judged(served), 0.95, 0.05)
    assert verdict.passed
    assert 0.05 < verdict.low < verdict.gain < 0.1


@pytest.mark.parametrize("gain", [0.0, -0.2])
def test_one_that_is_not_better_stays_out(gain):
    verdict = compare(judged(noisy(1.5 + gain, 12, seed=2)), judged(noisy(1.5, 12, seed=3)), 0.95, 0.05)
    assert not verdict.passed
    assert verdict.why.startswith("not clearly better")


def test_equals_pass_at_most_as_often_as_the_confidence_allows():
    passed = sum(
        compare(judged(noisy(1.5, 16, seed=i)), judged(noisy(1.5, 16, seed=-1 - i)), 0.95, 1.0).passed
        for i in range(1000)
    )
    assert 25 <= passed <= 75


def test_a_slice_that_loses_keeps_it_out_and_is_named():
    slices = ["chat"] * 20 + ["code"] * 4 + ["rare"] * 3
    served = [1.5] * 27
    better = [*noisy(1.8, 20, seed=4), *noisy(1.3, 4, seed=5, spread=0.02), 1.0, 1.0, 1.0]
    verdict = compare(judged(better, slices), judged(served, slices), 0.95, 0.05)
    assert not verdict.passed
    assert "slice 'code' loses 12" in verdict.why
    assert verdict.slices.keys() == {"chat", "code"}  # too little is known of the rare one
    assert compare(judged(better, slices), judged(served, slices), 0.95, 0.2).passed


def test_too_few_samples_are_no_evidence():
    verdict = compare(judged([2.0] * 3), judged([1.0] * 3), 0.95, 0.05)
    assert not verdict.passed
    assert "3 held-out samples are too few" in verdict.why


def test_a_loss_is_what_is_lost_beyond_chance():
    verdict = compare(judged(noisy(1.2, 16, seed=2)), judged(noisy(1.5, 16, seed=3)), 0.95, 1.0)
    lost = -verdict.gain / verdict.served
    assert 0.3 / 1.8 / 2 < verdict.least_loss < lost
    assert verdict.gain + verdict.served * verdict.least_loss == pytest.approx(verdict.low - verdict.gain)


@pytest.mark.parametrize("gain", [-0.01, 0.3])
def test_what_may_be_a_gain_is_no_loss(gain):
    assert compare(judged(noisy(1.5 + gain, 16, seed=2)), judged(noisy(1.5, 16, seed=3)), 0.95, 1.0).least_loss == 0


def test_of_too_few_samples_nothing_is_lost():
    assert compare(judged([1.0] * 3), judged([2.0] * 3), 0.95, 0.05).least_loss == 0
