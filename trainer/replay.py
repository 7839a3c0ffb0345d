"""Samples waiting for their first step, samples to train on again, and samples held out."""

import random
from collections import deque

from sglang_specforge.contracts.control import TokenLedger
from trainer.sample import Sample

_HELD_OUT_SAMPLES = 64  # the newest; evaluation follows what is being served


class ReplayBuffer:
    """Every ``holdout_every``-th sample is held out. The oldest go when ``capacity_tokens`` is reached.

    A token that comes in pays for ``epochs`` passes over a token, so that a quiet server is not overfitted.
    """

    def __init__(self, ledger: TokenLedger, capacity_tokens: int, holdout_every: int, seed: int, epochs: float) -> None:
        self.held_out: deque[Sample] = deque(maxlen=_HELD_OUT_SAMPLES)
        self._ledger, self._capacity_tokens, self._holdout_every = ledger, capacity_tokens, holdout_every
        self._epochs, self._credit_tokens = epochs, 0.0
        self._fresh: deque[Sample] = deque()
        self._trained: deque[Sample] = deque()
        self._tokens = self._added = 0
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self._fresh) + len(self._trained)

    @property
    def fresh_tokens(self) -> int:
        return sum(map(len, self._fresh))

    def can_fill(self, batch_tokens: int) -> bool:
        """There are samples for a whole batch, and passes over them left."""
        return min(self._tokens, self._credit_tokens) >= batch_tokens

    def add(self, sample: Sample) -> bool:
        """Take in a sample; returns whether it is held out."""
        self._added += 1
        if self._added % self._holdout_every == 0:
            self.held_out.append(sample)
            self._ledger.held_out += len(sample)
            return True
        self._fresh.append(sample)
        self._tokens += len(sample)
        self._credit_tokens += self._epochs * len(sample)
        while self._tokens > self._capacity_tokens and len(self) > 1:
            if self._trained:
                oldest = self._trained.popleft()
            else:
                oldest = self._fresh.popleft()
                self._ledger.drop("replay_full", len(oldest))
            self._tokens -= len(oldest)
        self._credit_tokens = min(self._credit_tokens, self._epochs * self._capacity_tokens)
        return False

    def draw(self, batch_tokens: int) -> list[Sample]:
        """Samples for one step of at most ``batch_tokens`` tokens (or one sample that is longer): fresh ones first."""
        batch: list[Sample] = []
        tokens = 0
        pool = self._random.sample(list(self._trained), len(self._trained))
        while self._fresh or pool:
            sample = self._fresh[0] if self._fresh else pool[-1]
            tokens += len(sample)
            if batch and tokens > batch_tokens:
                break
            batch.append(sample)
            self._credit_tokens -= len(sample)
            if self._fresh:
                self._trained.append(self._fresh.popleft())
                self._ledger.trained += len(sample)
            else:
                pool.pop()
        return batch
