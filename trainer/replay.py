"""Samples waiting for their first step, samples to train on again, and samples held out."""

import hashlib
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sglang_specforge.contracts.control import Staleness, TokenLedger
from trainer.sample import Sample

_HELD_OUT_SAMPLES = 64  # the newest; evaluation follows what is being served

Policy = Literal["newest", "reservoir"]


class _Kept(NamedTuple):
    sample: Sample
    came_s: float  # of the epoch
    ledger: TokenLedger  # of the stream that it came by


class ReplayBuffer:
    """A token budget: fresh samples first, then older ones at random, by the weights of their slices; those that came
    after a fall of their slice's acceptance weigh ``drift_weight`` times as much (``follow``).

    What is held out is chosen by content, so that a sequence that comes again stays on its side. One that is there
    already is not stored twice. A token that comes in pays for ``epochs`` passes over a token, so that a quiet server
    is not overfitted. When ``capacity_tokens`` is reached, samples that were trained on go first: the oldest
    (``newest``), or any of them (``reservoir``), which keeps a thinning share of the past.
    """

    def __init__(
        self,
        capacity_tokens: int,
        holdout_every: int,
        seed: int,
        epochs: float,
        policy: Policy = "newest",
        slice_weights: Mapping[str, float] | None = None,
        drift_weight: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._weights, self._drift_weight, self._clock = slice_weights or {}, drift_weight, clock
        self._moved: Mapping[str, float] = {}
        self._capacity_tokens, self._holdout_every = capacity_tokens, holdout_every
        self._epochs, self._credit_tokens, self._policy = epochs, 0.0, policy
        self._held_out: OrderedDict[bytes, _Kept] = OrderedDict()
        self._fresh: OrderedDict[bytes, _Kept] = OrderedDict()
        self._trained: OrderedDict[bytes, _Kept] = OrderedDict()
        self._tokens = 0
        self._random = random.Random(seed)
        self.staleness = Staleness()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._trained)

    @property
    def held_out(self) -> list[Sample]:
        """Oldest first, without those from before a fall of their slice's acceptance: nothing like them is served."""
        return [k.sample for k in self._held_out.values() if (since := self._fell(k)) is None or k.came_s >= since]

    def follow(self, moved: Mapping[str, float]) -> None:
        """The slices ("": all) whose acceptance has fallen, and when, in seconds of the epoch."""
        self._moved = moved

    def fresh_tokens(self, ledger: TokenLedger) -> int:
        """Captured tokens that came with ``ledger`` and wait for their first step."""
        return sum(kept.sample.captured for kept in self._fresh.values() if kept.ledger is ledger)

    def can_fill(self, batch_tokens: int) -> bool:
        """There are samples for a whole batch, and passes over them left."""
        return min(self._tokens, self._credit_tokens) >= batch_tokens

    def add(self, sample: Sample, ledger: TokenLedger) -> bool:
        """Take in a sample, whose tokens ``ledger`` accounts for; returns whether it is held out."""
        key = _key(sample)
        if int.from_bytes(key[:4], "little") % self._holdout_every == 0:
            self._hold_out(key, _Kept(sample, self._clock(), ledger))
            ledger.held_out += sample.captured
            return True
        self._credit_tokens += self._epochs * len(sample)
        if key in self._fresh or key in self._trained:
            ledger.drop("duplicate", sample.captured)
        else:
            self._fresh[key] = _Kept(sample, self._clock(), ledger)
            self._tokens += len(sample)
            while self._tokens > self._capacity_tokens and len(self) > 1:
                self._forget()
        self._credit_tokens = min(self._credit_tokens, self._epochs * self._capacity_tokens)
        return False

    def count_tokens(self, vocab_size: int, generated_only: bool) -> Tensor:
        """How often each token is one to be learnt, int64 [V], in the samples that are trained on."""
        counts_V = torch.zeros(vocab_size, dtype=torch.int64)
        for kept in (*self._fresh.values(), *self._trained.values()):
            learnt_L = kept.sample.learnt(generated_only)
            counts_V.index_add_(0, learnt_L, torch.ones_like(learnt_L))
        return counts_V

    def draw(self, batch_tokens: int) -> list[Sample]:
        """Samples for one step of at most ``batch_tokens`` tokens (or one sample that is longer): fresh ones first."""
        batch: list[_Kept] = []
        tokens = 0
        pool = sorted(self._trained.values(), key=self._chance)
        while self._fresh or pool:
            kept = next(iter(self._fresh.values())) if self._fresh else pool[-1]
            tokens += len(kept.sample)
            if batch and tokens > batch_tokens:
                break
            batch.append(kept)
            self._credit_tokens -= len(kept.sample)
            if self._fresh:
                key, _ = self._fresh.popitem(last=False)
                self._trained[key] = kept
                kept.ledger.trained += kept.sample.captured
            else:
                pool.pop()
        self._look_at_age(batch)
        return [kept.sample for kept in batch]

    def _chance(self, kept: _Kept) -> float:
        """Sorted by it, samples lie in a random order, in which the weight of a slice is the chance to come last."""
        weight, since = self._weights.get(kept.sample.slice, 1.0), self._fell(kept)
        if since is not None and kept.came_s >= since:
            weight *= self._drift_weight
        return self._random.random() ** (1 / weight)

    def _fell(self, kept: _Kept) -> float | None:
        """When the acceptance of such samples fell."""
        return self._moved.get(kept.sample.slice, self._moved.get(""))

    def _hold_out(self, key: bytes, kept: _Kept) -> None:
        self._held_out.pop(key, None)
        self._held_out[key] = kept
        if len(self._held_out) > _HELD_OUT_SAMPLES:
            self._held_out.popitem(last=False)

    def _forget(self) -> None:
        if not self._trained:
            _, gone = self._fresh.popitem(last=False)
            gone.ledger.drop("replay_full", gone.sample.captured)
        elif self._policy == "newest":
            _, gone = self._trained.popitem(last=False)
        else:
            gone = self._trained.pop(self._random.choice(list(self._trained)))
        self._tokens -= len(gone.sample)

    def _look_at_age(self, batch: list[_Kept]) -> None:
        now_s = self._clock()
        ages_s = [now_s - kept.came_s for kept in batch]
        self.staleness = Staleness(
            mean_age_s=sum(ages_s) / len(ages_s), oldest_age_s=max(ages_s), buffered_samples=len(self)
        )


def _key(sample: Sample) -> bytes:
    """Equal for equal sequences; one whose beginning is not known is equal to none."""
    digest = hashlib.sha256(sample.tokens_T.numpy().tobytes())
    if sample.start:
        digest.update(sample.rid.encode())
    return digest.digest()
