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
    places_M3: Tensor  # int32: where those are in time, height and width

    @classmethod
    def of_text(cls, tokens_N: Tensor, aux_N3H: Tensor, last_NH: Tensor) -> "Rows":
        return cls(tokens_N, aux_N3H, last_NH, last_NH[:0], torch.empty(0, 3, dtype=torch.int32))

    def pick(self, some: slice | Tensor) -> "Rows":
        """Some of them (int64 places, or a slice), each with its embedding where it has one."""
        tokens_N, embeds_MH, places_M3 = self.tokens_N[some], self.embeds_MH, self.places_M3
        if len(embeds_MH):
            own = ((self.tokens_N < 0).cumsum(0) - 1)[some][tokens_N < 0]
            embeds_MH, places_M3 = embeds_MH[own], places_M3[own]
        return Rows(tokens_N, self.aux_N3H[some], self.last_NH[some], embeds_MH, places_M3)

    @classmethod
    def joined(cls, parts: Iterable["Rows"]) -> "Rows":
        """One after another, copied."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def are_finite(self) -> bool:
        """One look at each value; ``isfinite`` takes thirty times as long on a CPU."""
        some = (t for t in (self.aux_N3H, self.last_NH, self.embeds_MH) if t.numel())
        return all(bool(torch.stack(t.aminmax()).isfinite().all()) for t in some)

    def is_finite_N(self) -> Tensor:
        """Of which rows all values are, bool [N]."""
        finite_N = self.aux_N3H.isfinite().all(-1) & self.last_NH.isfinite().all(-1)
        finite_N[self.tokens_N < 0] &= self.embeds_MH.isfinite().all(-1)
        return finite_N

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def positions_on_axes(tokens_N: Tensor, places_M3: Tensor, start: int) -> Tensor:
    """Where each row is in time, height and width, int64 [N, 3], as the target has them: text goes on after the
    farthest that the image before it reaches, alike on all three. Before the first image it counts down from it, and
    where there is none, from ``start``: what lies before these rows would shift all of them, which changes nothing.
    """
    row_N, is_text_N = torch.arange(len(tokens_N)), tokens_N >= 0
    reach_N, image_N = torch.full_like(row_N, -1), torch.where(is_text_N, -1, row_N)
    reach_N[~is_text_N] = places_M3.amax(-1).long()
    reach_N, image_N = reach_N.cummax(0).values, image_N.cummax(0).values  # up to each row; image_N: the last one's row
    first = int(is_text_N.long().argmin()) if len(places_M3) else 0
    begin = int(places_M3[0].min()) - first if len(places_M3) else start
    positions_N = torch.where(image_N < 0, begin + row_N, reach_N + row_N - image_N)
    positions_N3 = positions_N[:, None].repeat(1, 3)
    positions_N3[~is_text_N] = places_M3.long()
    return positions_N3
