"""What the trainer learns from: one request's captured states, and batches of them.

Shapes: T captured tokens of a sample, N rows of a pack, H hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Consecutive positions of one request, from ``start`` on."""

    rid: str
    start: int
    prompt_tokens: int  # absolute positions below are the prompt
    tokens_T: Tensor  # int64
    aux_T3H: Tensor
    last_TH: Tensor
    draft_version: int | None  # the one version that was active for all of it, or None
    proposals: list[tuple[int, int]]  # position of the input token, token that the worker proposed after it

    def __len__(self) -> int:
        return self.tokens_T.numel()


class Pack(NamedTuple):
    """Samples end to end, without padding."""

    tokens_N: Tensor  # int64
    aux_N3H: Tensor
    last_NH: Tensor
    positions_N: Tensor  # int64, absolute
    first_row_N: Tensor  # int64, of the row's sample
    prompt_N: Tensor  # int64, prompt tokens of the row's sample
    bounds: list[tuple[int, int]]  # first row of each sample, and the row after its last


def pack(samples: list[Sample], device: torch.device) -> Pack:
    lengths = [len(s) for s in samples]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def per_row(values: list[int]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)

    first_row_N = per_row([first for first, _ in bounds])
    return Pack(
        tokens_N=torch.cat([s.tokens_T for s in samples]).to(device),
        aux_N3H=torch.cat([s.aux_T3H for s in samples]).to(device),
        last_NH=torch.cat([s.last_TH for s in samples]).to(device),
        positions_N=per_row([s.start for s in samples]) + torch.arange(ends[-1], device=device) - first_row_N,
        first_row_N=first_row_N,
        prompt_N=per_row([s.prompt_tokens for s in samples]),
        bounds=bounds,
    )
