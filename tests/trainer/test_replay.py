"""What is trained on, how often, and what is forgotten."""

import itertools
from collections import Counter

import pytest

from sglang_specforge.contracts.control import TokenLedger
from tests.tiny import make_sample
from trainer.replay import ReplayBuffer


def make(capacity=1000, holdout_every=1 << 32, epochs=2.0, policy="newest", **more):
    ledger = TokenLedger()
    return ReplayBuffer(capacity, holdout_every, seed=0, epochs=epochs, policy=policy, **more), ledger


def test_fresh_samples_come_first_and_are_counted_once():
    buffer, ledger = make()
    for seed in range(4):
        buffer.add(make_sample(10, seed=seed), ledger)
    assert [s.rid for s in buffer.draw(20)] == ["r0", "r1"]
    assert [s.rid for s in buffer.draw(40)][:2] == ["r2", "r3"]
    buffer.draw(40)
    assert ledger.trained == 40
    assert buffer.fresh_tokens(ledger) == 0


def test_held_out_sequences_are_never_drawn_however_often_they_come():
    buffer, ledger = make(holdout_every=2)
    held = [buffer.add(make_sample(10, seed=seed), ledger) for seed in range(20)]
    assert 4 <= sum(held) <= 16
    assert [buffer.add(make_sample(10, seed=seed), ledger) for seed in range(20)] == held
    drawn = {s.rid for _ in range(20) for s in buffer.draw(30)}
    assert drawn == {f"r{seed}" for seed in range(20) if not held[seed]}
    assert ledger.held_out == 2 * 10 * sum(held)
    assert len(buffer.held_out) == sum(held)


def test_a_sequence_that_comes_again_is_not_stored_twice_but_pays():
    buffer, ledger = make(epochs=2)
    buffer.add(make_sample(10), ledger)
    buffer.add(make_sample(10, rid="again"), ledger)
    assert len(buffer) == 1
    assert ledger.dropped == {"duplicate": 10}
    passes = 0
    while buffer.can_fill(10):
        passes += len(buffer.draw(10))
    assert passes == 4


def test_equal_endings_of_unknown_beginnings_are_not_the_same():
    buffer, ledger = make()
    buffer.add(make_sample(10, start=5, rid="a"), ledger)
    buffer.add(make_sample(10, start=5, rid="b"), ledger)
    assert len(buffer) == 2


def test_a_reservoir_keeps_some_of_the_past():
    kept = {}
    for policy in ("newest", "reservoir"):
        buffer, ledger = make(capacity=200, policy=policy)
        for seed in range(100):
            buffer.add(make_sample(10, seed=seed), ledger)
            buffer.draw(10)
        kept[policy] = sorted(int(s.rid[1:]) for s in buffer.draw(200))
    assert kept["newest"] == list(range(80, 100))
    assert kept["reservoir"][0] < 70
    assert len(kept["reservoir"]) == 20


def test_the_age_of_what_is_trained_on_is_known():
    buffer, ledger = make()
    buffer.add(make_sample(10), ledger)
    buffer.draw(10)
    assert buffer.staleness.buffered_samples == 1
    assert 0 <= buffer.staleness.mean_age_s <= buffer.staleness.oldest_age_s < 60


def test_tokens_pay_for_their_passes():
    buffer, ledger = make(epochs=2)
    buffer.add(make_sample(10), ledger)
    passes = 0
    while buffer.can_fill(10):
        passes += len(buffer.draw(10))
    assert passes == 2


def test_a_batch_exceeds_its_tokens_only_for_a_single_sample():
    buffer, ledger = make()
    for seed, tokens in enumerate([10, 30, 10, 20]):
        buffer.add(make_sample(tokens, seed=seed), ledger)
    assert [len(s) for s in buffer.draw(45)] == [10, 30]
    assert [len(s) for s in buffer.draw(5)] == [10]


def test_the_oldest_are_forgotten_and_untrained_ones_counted():
    buffer, ledger = make(capacity=30)
    for seed in range(2):
        buffer.add(make_sample(10, seed=seed), ledger)
    buffer.draw(20)
    for seed in range(2, 5):
        buffer.add(make_sample(10, seed=seed), ledger)
    assert ledger.dropped == {}
    buffer.add(make_sample(10, seed=5), ledger)
    assert ledger.dropped == {"replay_full": 10}
    assert [s.rid for s in buffer.draw(30)] == ["r3", "r4", "r5"]


def test_older_samples_are_drawn_by_the_weights_of_their_slices():
    buffer, ledger = make(slice_weights={"code": 4.0})
    for seed in range(20):
        buffer.add(make_sample(10, seed=seed, slice=("code", "chat")[seed % 2]), ledger)
    buffer.draw(200)
    drawn = Counter(sample.slice for _ in range(2000) for sample in buffer.draw(10))
    assert drawn["code"] + drawn["chat"] == 2000
    assert drawn["code"] / drawn["chat"] == pytest.approx(4, rel=0.15)


def test_after_a_fall_of_acceptance_what_came_since_is_drawn_more_and_evaluated_on_alone():
    buffer, ledger = make(capacity=10_000, holdout_every=4, drift_weight=4.0, clock=itertools.count().__next__)
    for seed in range(80):  # the first half of them before the fall, at 40
        buffer.add(make_sample(10, seed=seed, slice=("code", "chat")[seed % 2]), ledger)
    everything = buffer.held_out
    buffer.draw(10_000)

    def drawn():
        return Counter((s.slice, int(s.rid[1:]) >= 40) for _ in range(2000) for s in buffer.draw(10))

    buffer.follow({"code": 40.0})
    counts = drawn()
    assert counts["code", True] / counts["code", False] > 2.5
    assert counts["chat", True] / counts["chat", False] < 2
    assert [s for s in everything if s.slice == "chat" or int(s.rid[1:]) >= 40] == buffer.held_out
    buffer.follow({"": 40.0})
    assert [s for s in everything if int(s.rid[1:]) >= 40] == buffer.held_out
    buffer.follow({})
    assert buffer.held_out == everything


def test_restored_context_fills_the_buffer_but_is_counted_with_the_sample_it_came_with():
    buffer, ledger = make(capacity=50)
    for seed in range(3):
        buffer.add(make_sample(20, seed=seed, restored=15), ledger)
    assert ledger.dropped == {"replay_full": 5}
    assert buffer.fresh_tokens(ledger) == 10
    buffer.add(make_sample(20, seed=2, restored=15), ledger)
    assert ledger.dropped == {"replay_full": 5, "duplicate": 5}
    buffer.draw(40)
    assert ledger.trained == 10


def test_each_stream_has_an_account_of_its_own():
    buffer, first = make()
    second = TokenLedger()
    buffer.add(make_sample(10, seed=0), first)
    buffer.add(make_sample(20, seed=1), second)
    buffer.add(make_sample(10, seed=0), second)  # the other server served it too
    assert (buffer.fresh_tokens(first), buffer.fresh_tokens(second)) == (10, 20)
    buffer.draw(40)
    assert (first.trained, first.dropped) == (10, {})
    assert (second.trained, second.dropped) == (20, {"duplicate": 10})
