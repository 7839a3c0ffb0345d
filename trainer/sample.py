"""What the trainer learns from: one request's captured states, and batches of them.

Shapes: T captured tokens, B samples, L rows, H hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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


class Batch(NamedTuple):
    """Samples padded to one length; padding rows have ``lengths`` to tell them by."""

    tokens_BL: Tensor
    aux_BL3H: Tensor
    last_BLH: Tensor
    positions_BL: Tensor
    prompt_B: Tensor  # prompt tokens, absolute
    lengths_B: Tensor


def collate(samples: list[Sample], device: torch.device) -> Batch:
    tokens_BL, aux_BL3H, last_BLH = (
        pad_sequence(rows, batch_first=True).to(device)
        for rows in zip(*((s.tokens_T, s.aux_T3H, s.last_TH) for s in samples), strict=True)
    )
    start_B1 = torch.tensor([[s.start] for s in samples], device=device)
    return Batch(
        tokens_BL,
        aux_BL3H,
        last_BLH,
        start_B1 + torch.arange(tokens_BL.shape[1], device=device),
        torch.tensor([s.prompt_tokens for s in samples], device=device),
        torch.tensor([len(s) for s in samples], device=device),
    )
