"""Dealing a step's samples to processes by token count, so that none waits long for the others."""

import heapq


def deal(lengths: list[int], ranks: int, pass_tokens: int | None = None) -> list[list[list[int]]]:
    """For each rank, its passes; for each pass, indices into ``lengths``.

    The longest sample goes first, always to the rank with the fewest tokens; a rank's samples are then cut into passes
    of at most ``pass_tokens`` tokens (or one sample that is longer). Every rank gets the same number of passes, as
    their collectives have to meet, so the last ones may be empty. The same input gives the same deal everywhere.
    """
    loads = [(0, rank) for rank in range(ranks)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(loads)
        hands[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], rank))
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
