"""Captured rows on their way through the trainer, and of which of them the target read no token.

Shapes: N rows, M of them of no token, H hidden.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Consecutive positions of a sequence."""

    tokens_N: Tensor  # int64; below zero is none, and the target read the next of ``embeds_MH`` in its place
    aux_N3H: Tensor
    last_NH: Tensor
    embeds_MH: Tensor

    def pick(self, some: slice | Tensor) -> "Rows":
        """Some of them (int64 places, or a slice), each with its embedding where it has one."""
        tokens_N, embeds_MH = self.tokens_N[some], self.embeds_MH
        if len(embeds_MH):
            place_N = (self.tokens_N < 0).cumsum(0) - 1
            embeds_MH = embeds_MH[place_N[some][tokens_N < 0]]
        return Rows(tokens_N, self.aux_N3H[some], self.last_NH[some], embeds_MH)

    @classmethod
    def joined(cls, parts: Iterable["Rows"]) -> "Rows":
        """One after another, copied."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)
