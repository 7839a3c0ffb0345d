"""Which of the target's tokens the draft can say, held against what is served.

A draft's vocabulary bounds its acceptance, whatever it learns: a token that it cannot say ends every chain. Shapes: V
target and D draft vocabulary.
"""

import logging

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from sglang_specforge.contracts import control
from sglang_specforge.new_draft import choose_vocabulary

logger = logging.getLogger(__name__)

_FEWEST_TOKENS = 4096  # of which little is known before


class VocabularyWatch:
    """``least_gain``: the share of tokens that another vocabulary has to hold more, to be worth a change."""

    def __init__(self, least_gain: float) -> None:
        self._least_gain = least_gain
        self.seen = control.Vocabulary()

    def better(self, counts_V: Tensor, t2d_V: Tensor) -> Tensor | None:
        """Ids of the most frequent tokens, ascending int64 [D], where they hold so many more than the draft's own
        (bool [V]) do; of tokens that are equally frequent, it keeps those that it has."""
        tokens, draft_tokens = int(counts_V.sum()), int(t2d_V.sum())
        if not tokens:
            return None
        ids_D = choose_vocabulary(t2d_V.numel(), draft_tokens, 2 * counts_V + t2d_V)
        coverage, best = (int(counts_V[held].sum()) / tokens for held in (t2d_V, ids_D))
        is_better = tokens >= _FEWEST_TOKENS and best - coverage >= self._least_gain
        self.seen = control.Vocabulary(
            tokens=draft_tokens, counted=tokens, coverage=coverage, chosen=self.seen.chosen + is_better
        )
        if not is_better:
            return None
        logger.info(
            "draft training: the draft vocabulary is chosen anew: %d other tokens of %d; it holds %.1f%% of what is "
            "served, where it held %.1f%%",
            int((~t2d_V[ids_D]).sum()), draft_tokens, 100 * best, 100 * coverage,
        )  # fmt: skip
        return ids_D


def take_rows(sharded: DTensor, row_D: Tensor, new: Tensor | float) -> None:
    """Row d becomes the one that was row ``row_D[d]``, or ``new`` (all D rows, or a number) where that is -1. All
    processes call it together."""
    rows = sharded.to(row_D.device).full_tensor()[row_D.clamp(min=0)]
    is_known = (row_D >= 0).view(-1, *[1] * (rows.ndim - 1))
    rows = torch.where(is_known, rows, new)
    own = distribute_tensor(rows, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(own.to_local())
