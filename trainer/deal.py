"""Dealing a step's samples to processes by token count, so that none waits long for the others."""

import heapq
from collections.abc import Sequence


def deal(
    lengths: list[int], ranks: int, pass_tokens: int | None = None, dealt: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """For each rank, its passes; for each pass, indices into ``lengths``.

    The longest sample goes first, always to the hand with the fewest tokens; a hand is then cut into passes of at most
    ``pass_tokens`` tokens (or one sample that is longer). Every rank gets the same number of passes, as their
    collectives have to meet, so the last ones may be empty. With ``dealt``, the tokens of each rank so far, the rank
    with the fewest gets the largest hand, so that shares even out. The same input gives the same deal everywhere.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, hand) for hand in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, hand = heapq.heappop(loads)
        hands[hand].append(index)
        heapq.heappush(loads, (tokens + lengths[index], hand))
    if dealt is not None:
        largest_first = [hands[hand] for _, hand in sorted(loads, reverse=True)]
        emptiest_first = sorted(range(ranks), key=lambda rank: (dealt[rank], rank))
        hands = [hand for _, hand in sorted(zip(emptiest_first, largest_first, strict=True))]
    passes = [_cut(sorted(hand), lengths, pass_tokens) for hand in hands]
    most = max(map(len, passes))
    return [own + [[]] * (most - len(own)) for own in passes]


def _cut(hand: list[int], lengths: list[int], pass_tokens: int | None) -> list[list[int]]:
    passes: list[list[int]] = [[]]
    tokens = 0
    for index in hand:
        if pass_tokens is not None and passes[-1] and tokens + lengths[index] > pass_tokens:
            passes.append([])
            tokens = 0
        passes[-1].append(index)
        tokens += lengths[index]
    return passes
