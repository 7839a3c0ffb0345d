"""Dealing: everything once, even loads, meeting collectives."""

import random

import pytest

from trainer.deal import deal


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("pass_tokens", [None, 300])
def test_every_sample_is_dealt_once_and_no_rank_idles(ranks, pass_tokens):
    lengths = [random.Random(i).randint(1, 400) for i in range(60)]
    hands = deal(lengths, ranks, pass_tokens)
    assert sorted(i for passes in hands for own in passes for i in own) == list(range(60))
    assert len({len(passes) for passes in hands}) == 1
    loads = [sum(lengths[i] for own in passes for i in own) for passes in hands]
    assert max(loads) - min(loads) <= min(lengths) + 40
    if pass_tokens:
        assert all(len(own) == 1 or sum(lengths[i] for i in own) <= 300 for passes in hands for own in passes)


def test_a_rank_without_samples_still_takes_part():
    assert deal([7], 3) == [[[0]], [[]], [[]]]


def test_shares_even_out_over_steps():
    dealt = [0, 0, 0]
    for step in range(50):
        lengths = [random.Random(step * 100 + i).randint(50, 200) for i in range(7)]
        for rank, passes in enumerate(deal(lengths, 3, dealt=dealt)):
            dealt[rank] += sum(lengths[i] for own in passes for i in own)
    assert max(dealt) < 1.02 * min(dealt)
