"""Which rows of a pack a chain of drafts is unrolled from.

A row of a prompt that predicts nothing to learn from is read by the rows after it at step 0, as a key and a value, and
never again: nothing else of it is computed. Shapes: N rows of a pack, L roots among them, K steps.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

Runs = list[tuple[int, int]]  # of rows: the first, and the one after the last


class Run(NamedTuple):
    """Rows that follow one another, and the first row of their sample."""

    first: int
    start: int
    end: int  # the row after the last


class Roots:
    def __init__(self, runs: list[Run], rows: int, device: torch.device) -> None:
        self.runs, self.rows, self.device = tuple(runs), rows, device

    @classmethod
    def everywhere(cls, samples: Runs, device: torch.device) -> "Roots":
        """Every row of a pack of these samples."""
        return cls([Run(first, first, end) for first, end in samples], samples[-1][1], device)

    @classmethod
    def of_chains_to(cls, taught: list[Run], rows: int, steps: int, device: torch.device) -> "Roots":
        """The rows whose chains of ``steps`` reach one of the ``taught`` rows: row n of step k reaches row n+1+k.

        No taught row is its sample's first. Where there is none, the first row of all is a root: a pass computes
        something whatever it is given, as processes that train together have to meet in it.
        """
        runs: list[Run] = []
        for first, start, end in taught:
            run = Run(first, max(first, start - steps), end - 1)
            if runs and run.start <= runs[-1].end:
                run = Run(first, runs.pop().start, run.end)
            runs.append(run)
        return cls(runs or [Run(0, 0, 1)], rows, device)

    def pick(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of all rows' values, the roots'; what is the roots' already stays as it is."""
        if x.shape[dim] == self.count:
            return x
        return x.index_select(dim, self.row_L)

    @cached_property
    def count(self) -> int:
        return sum(end - start for _, start, end in self.runs)

    @cached_property
    def row_L(self) -> Tensor:
        """Each root's row, int64."""
        return rows_of(self.runs, self.device)

    @cached_property
    def place_N(self) -> Tensor:
        """Each row's place among the roots, int64; that of any other row is of no use, but within bounds."""
        place_L = torch.arange(self.count, device=self.device)
        return place_L.new_zeros(self.rows).index_copy_(0, self.row_L, place_L)


def repeated(values: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Each value as often as its length says, int64."""
    return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device, non_blocking=True)


def rows_of(runs: Sequence[Run], device: torch.device) -> Tensor:
    """Their rows one by one, int64."""
    row_M = torch.cat([torch.arange(0), *(torch.arange(start, end) for _, start, end in runs)])
    return row_M.to(device, non_blocking=True)


def runs_of(is_in_N: Tensor) -> Runs:
    """Runs of the rows of which it is true."""
    edge_N = torch.diff(is_in_N.int(), prepend=is_in_N.new_zeros(1).int(), append=is_in_N.new_zeros(1).int())
    edges = edge_N.nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
