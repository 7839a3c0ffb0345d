"""``flex_attention`` in plain matrices: PyTorch's has no backward on a CPU."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask


def plain_flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, enable_gqa: bool, return_aux: AuxRequest
) -> tuple[Tensor, Any]:
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    at, rows = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
    head = torch.zeros((), dtype=torch.int64, device=q.device)
    seen = block_mask.mask_mod(head, head, at[:, None], rows[None])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))
