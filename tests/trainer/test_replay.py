"""What is trained on, how often, and what is forgotten."""

from sglang_specforge.contracts.control import TokenLedger
from tests.tiny import make_sample
from trainer.replay import ReplayBuffer


def make(capacity=1000, holdout_every=1000, epochs=2.0):
    ledger = TokenLedger()
    return ReplayBuffer(ledger, capacity, holdout_every, seed=0, epochs=epochs), ledger


def test_fresh_samples_come_first_and_are_counted_once():
    buffer, ledger = make()
    for seed in range(4):
        buffer.add(make_sample(10, seed=seed))
    assert [s.rid for s in buffer.draw(20)] == ["r0", "r1"]
    assert [s.rid for s in buffer.draw(40)][:2] == ["r2", "r3"]
    buffer.draw(40)
    assert ledger.trained == 40
    assert buffer.fresh_tokens == 0


def test_held_out_samples_are_never_drawn():
    buffer, ledger = make(holdout_every=2)
    held = [buffer.add(make_sample(10, seed=seed)) for seed in range(6)]
    assert held == [False, True] * 3
    drawn = {s.rid for _ in range(20) for s in buffer.draw(30)}
    assert drawn == {"r0", "r2", "r4"}
    assert ledger.held_out == 30


def test_tokens_pay_for_their_passes():
    buffer, _ = make(epochs=2)
    buffer.add(make_sample(10))
    passes = 0
    while buffer.can_fill(10):
        passes += len(buffer.draw(10))
    assert passes == 2


def test_a_batch_exceeds_its_tokens_only_for_a_single_sample():
    buffer, _ = make()
    for seed, tokens in enumerate([10, 30, 10, 20]):
        buffer.add(make_sample(tokens, seed=seed))
    assert [len(s) for s in buffer.draw(45)] == [10, 30]
    assert [len(s) for s in buffer.draw(5)] == [10]


def test_the_oldest_are_forgotten_and_untrained_ones_counted():
    buffer, ledger = make(capacity=30)
    for seed in range(2):
        buffer.add(make_sample(10, seed=seed))
    buffer.draw(20)
    for seed in range(2, 5):
        buffer.add(make_sample(10, seed=seed))
    assert ledger.dropped == {}
    buffer.add(make_sample(10, seed=5))
    assert ledger.dropped == {"replay_full": 10}
    assert [s.rid for s in buffer.draw(30)] == ["r3", "r4", "r5"]
