"""What the blocks of an A/B say so far. Every arm that is still in has one turn in each block, in random order (on each
replica, where there are several), so that what changes slowly (load, prompts) falls on all of them alike; a block gives
one number for each pair of arms."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from pydantic import BaseModel

from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.sequential import always_valid_interval
from sglang_specforge.export.acceptance import Histogram, Standing, add_up, summary


class Turn(BaseModel):
    """One arm in one block: histograms of the tokens that verifications committed (``export.acceptance``)."""

    window: int  # the first, where replicas of the server took it by turns
    seconds: float  # of all replicas
    committed: list[Histogram]  # by Standing

    def __add__(self, later: "Turn") -> "Turn":
        committed = [add_up(pair) for pair in zip(self.committed, later.committed, strict=True)]
        return Turn(window=self.window, seconds=self.seconds + later.seconds, committed=committed)

    @cached_property
    def counted(self) -> Histogram:
        """Without what may still feel the arm before it."""
        return add_up([self.committed[Standing.SETTLED], self.committed[Standing.FRESH]])

    @cached_property
    def acceptance_length(self) -> float | None:
        return summary([self.counted])["length"]

    @cached_property
    def acceptance_length_of_fresh_requests(self) -> float | None:
        """Of those that began in this window: their whole draft context is this arm's."""
        return summary([self.committed[Standing.FRESH]])["length"]

    @cached_property
    def tokens_per_s(self) -> float:
        return summary(self.committed)["tokens"] / self.seconds


Block = list[Turn | None]  # by arm; None: it was out already


class Difference(BaseModel):
    """Of a second arm against a first, relative: 0.03 is 3 % more. Bounds are None while nothing can be said."""

    blocks: int
    mean: float | None
    low: float | None
    high: float | None


class Pair(BaseModel):
    """Two arms, by their places."""

    first: int
    second: int
    acceptance_length: Difference  # the one that decides
    acceptance_length_of_fresh_requests: Difference
    tokens_per_s: Difference  # also of passes that are left out of the others; load makes it noisy


class Judgement(BaseModel):
    """What can be said after the blocks so far."""

    pairs: list[Pair]
    out: list[int]  # arms that another one beats
    outcome: str | None  # better, worse or alike; None: go on
    winner: int | None


def judge(blocks: Sequence[Block], arms: int, plan: Plan) -> Judgement:
    """Of all blocks so far. An arm that is out stays out, because its later turns are missing."""
    pairs = [_compare(blocks, i, j, plan, arms) for i in range(arms) for j in range(i + 1, arms)]
    out = sorted(
        {p.first for p in pairs if _above_zero(p.acceptance_length.low)}
        | {p.second for p in pairs if _above_zero(_negative(p.acceptance_length.high))}
    )
    left = [arm for arm in range(arms) if arm not in out]
    remaining = [p.acceptance_length for p in pairs if p.first in left and p.second in left]
    outcome = winner = None
    if len(left) == 1:
        winner = left[0]
        outcome = "worse" if winner == 0 else "better"
    elif all(d.low is not None and max(-d.low, d.high) < plan.smallest_difference for d in remaining):
        outcome = "alike"
    return Judgement(pairs=pairs, out=out, outcome=outcome, winner=winner)


def _compare(blocks: Sequence[Block], first: int, second: int, plan: Plan, arms: int) -> Pair:
    alpha = plan.alpha / (arms * (arms - 1) / 2)
    both = [(block[first], block[second]) for block in blocks if block[first] and block[second]]

    def difference(measure: Callable[[Turn], float | None]) -> Difference:
        measured = [(measure(a), measure(b)) for a, b in both]
        ratios = [math.log(b / a) for a, b in measured if a and b]
        interval = always_valid_interval(ratios, alpha)
        mean, low, high = (math.expm1(x) if math.isfinite(x) else None for x in interval)
        return Difference(blocks=len(ratios), mean=mean, low=low, high=high)

    return Pair(
        first=first,
        second=second,
        acceptance_length=difference(lambda turn: turn.acceptance_length),
        acceptance_length_of_fresh_requests=difference(lambda turn: turn.acceptance_length_of_fresh_requests),
        tokens_per_s=difference(lambda turn: turn.tokens_per_s),
    )


def _above_zero(bound: float | None) -> bool:
    return bound is not None and bound > 0


def _negative(bound: float | None) -> float | None:
    return None if bound is None else -bound
