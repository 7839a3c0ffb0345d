"""What the trainer learns from: one sequence's captured states, and batches of them.

Shapes: T captured tokens of a sample, N rows of a pack, M of either of no token, H hidden.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.roots import Run, Runs, repeated, runs_of
from trainer.rows import Rows, positions_on_axes


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Consecutive positions of one sequence, from ``start`` on."""

    rid: str
    start: int
    tokens_T: Tensor  # int64; below zero is none (``rows.Rows``)
    aux_T3H: Tensor
    last_TH: Tensor
    embeds_MH: Tensor
    places_M3: Tensor
    generated_T: Tensor  # bool: the token after this row's is the target's (an assistant's), not a prompt's
    rejected_T: Tensor  # int64: the token that the live draft proposed there and the target refused, or -1
    slice: str = ""  # the request's label, or the data's
    draft_version: int | None = None  # the one version that was active for all of it, or None
    restored: int = 0  # of the first rows, those that were captured with another sample
    proposals: list[tuple[int, int]] = field(default_factory=list)  # input token's position, token proposed after it

    @property
    def captured(self) -> int:
        """Tokens that came with this sample."""
        return len(self) - self.restored

    @property
    def rows(self) -> Rows:
        return Rows(self.tokens_T, self.aux_T3H, self.last_TH, self.embeds_MH, self.places_M3)

    def teaches(self, generated_only: bool) -> Tensor:
        """Rows that teach what to draft, bool [T]: generated ones, or all but those before what is no token."""
        if generated_only:
            return self.generated_T
        return F.pad(self.tokens_T[1:] >= 0, (0, 1), value=True)

    def learnt(self, generated_only: bool) -> Tensor:
        """The tokens that are to be drafted, those after its rows that teach, int64 [L]."""
        next_T = self.tokens_T[1:]
        return next_T[self.teaches(generated_only)[:-1] & (next_T >= 0)]

    def __len__(self) -> int:
        return self.tokens_T.numel()


def fields_of(rows: Rows) -> dict[str, Tensor]:
    """The rows as fields of a sample."""
    return dict(zip(("tokens_T", "aux_T3H", "last_TH", "embeds_MH", "places_M3"), rows, strict=True))


class Pack(NamedTuple):
    """Samples end to end, without padding."""

    tokens_N: Tensor  # int64
    aux_N3H: Tensor
    last_NH: Tensor
    embeds_MH: Tensor
    rejected_N: Tensor  # int64
    positions_N: Tensor  # int64, absolute
    positions_N3: Tensor | None  # int64, on three axes; None where no image is shown, and all three are alike
    first_row_N: Tensor  # int64, of the row's sample
    samples: Runs  # rows of each
    generated: list[Run]  # rows whose next token is the target's
    of_tokens: list[Run]  # rows whose next token is one

    def taught(self, generated_only: bool) -> list[Run]:
        """Rows that teach what to draft (``Sample.teaches``): not a sample's first, which no draft is made for."""
        runs = self.generated if generated_only else self.of_tokens
        later = [run._replace(start=max(run.start, run.first + 1)) for run in runs]
        return [run for run in later if run.start < run.end]


def pack(samples: list[Sample], device: torch.device) -> Pack:
    lengths = [len(s) for s in samples]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in samples]).to(device, non_blocking=True)

    ahead_N = repeated([s.start - first for (first, _), s in zip(rows, samples, strict=True)], lengths, device)

    def teaching(generated_only: bool) -> list[Run]:
        return [
            Run(first, first + start, first + end)
            for (first, _), s in zip(rows, samples, strict=True)
            for start, end in runs_of(s.teaches(generated_only))
        ]

    on_axes = []
    if any(len(s.embeds_MH) for s in samples):
        on_axes = [positions_on_axes(s.tokens_T, s.places_M3, s.start) for s in samples]
    return Pack(
        *map(joined, ("tokens_T", "aux_T3H", "last_TH", "embeds_MH", "rejected_T")),
        positions_N=torch.arange(ends[-1], device=device) + ahead_N,
        positions_N3=torch.cat(on_axes).to(device, non_blocking=True) if on_axes else None,
        first_row_N=repeated([first for first, _ in rows], lengths, device),
        samples=rows,
        generated=teaching(generated_only=True),
        of_tokens=teaching(generated_only=False),
    )


def count_rows(samples: list[Sample], steps: int, generated_only: bool) -> list[int]:
    """Rows that count at each step: those whose teacher row lies in the sample and teaches."""
    teaches = [s.teaches(generated_only) for s in samples]
    return [sum(int(t[1 + k :].sum()) for t in teaches) for k in range(steps)]
