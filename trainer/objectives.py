"""Objectives of a training step: for some rows of logits, each row's loss and its gradient.

With draft probabilities q and target probabilities p: soft cross-entropy and its KL divergence (EAGLE-3, section
3.2), cross-entropy of the target's top token, total variation, and the LK losses (arXiv 2602.23881) on the acceptance
rate ``sum(min(p, q))``: ``-log`` of it, and KL blended with total variation. Shapes: S rows, D draft vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-6


class Rows(NamedTuple):
    """Some rows at one step, float32 or wider. An objective may overwrite ``draft_SD``."""

    logits_SD: Tensor
    draft_SD: Tensor  # softmax of the logits
    lse_S: Tensor  # log-sum-exp of the logits
    teacher_SD: Tensor  # the target's distribution, over the draft vocabulary alone
    mass_S: Tensor  # what the draft vocabulary holds of the target's whole distribution
    best_S: Tensor  # int64: draft id of the target's top token; 0 where there is none
    counts_S: Tensor  # bool: rows that the caller gives any weight


Objective = Callable[[Rows], tuple[Tensor, Tensor]]  # loss [S] and its gradient with respect to the logits [S, D]


def soft_ce(rows: Rows) -> tuple[Tensor, Tensor]:
    loss_S = rows.lse_S - torch.linalg.vecdot(rows.teacher_SD, rows.logits_SD)
    return loss_S, rows.draft_SD.sub_(rows.teacher_SD)


def forward_kl(rows: Rows) -> tuple[Tensor, Tensor]:
    loss_S, grad_SD = soft_ce(rows)
    return loss_S + torch.xlogy(rows.teacher_SD, rows.teacher_SD).sum(-1), grad_SD


def hard_ce(rows: Rows) -> tuple[Tensor, Tensor]:
    best_S1 = rows.best_S[:, None]
    loss_S = rows.lse_S - rows.logits_SD.gather(-1, best_S1)[:, 0]
    return loss_S, rows.draft_SD.scatter_add_(-1, best_S1, torch.full_like(loss_S, -1.0)[:, None])


def acceptance_rate(rows: Rows) -> tuple[Tensor, Tensor]:
    """``sum(min(p, q))``, the chance that speculative sampling accepts a token drawn from q, and its gradient."""
    target_SD = rows.teacher_SD * rows.mass_S[:, None]
    below_SD = rows.draft_SD < target_SD
    rate_S = torch.minimum(rows.draft_SD, target_SD).sum(-1)
    below_mass_S1 = (rows.draft_SD * below_SD).sum(-1, keepdim=True)
    return rate_S, rows.draft_SD * (below_SD.to(rows.draft_SD.dtype) - below_mass_S1)


def tv(rows: Rows) -> tuple[Tensor, Tensor]:
    rate_S, grad_SD = acceptance_rate(rows)
    return 1 - rate_S, grad_SD.neg_()


def lk_alpha(rows: Rows) -> tuple[Tensor, Tensor]:
    rate_S, grad_SD = acceptance_rate(rows)
    rate_S = rate_S.clamp(min=_SMALL)
    return -rate_S.log(), grad_SD.div_(-rate_S[:, None])


class LkLambda:
    """``kl_weight`` is the paper's lambda, ``exp(-lk_decay * mean acceptance rate)``, held constant through a step."""

    def __init__(self, kl_weight: float) -> None:
        self._kl_weight = kl_weight
        self.rate_sum: Tensor | float = (
            0.0  # acceptance rates of the rows that count, from which the next lambda is made
        )

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        rate_S, rate_grad_SD = acceptance_rate(rows)
        self.rate_sum += (rate_S * rows.counts_S).sum()
        kl_S, kl_grad_SD = forward_kl(rows)
        tv_weight = 1 - self._kl_weight
        loss_S = self._kl_weight * kl_S + tv_weight * (1 - rate_S)
        return loss_S, kl_grad_SD.mul_(self._kl_weight).sub_(rate_grad_SD, alpha=tv_weight)


OBJECTIVES: dict[str, Objective] = {
    "soft_ce": soft_ce, "forward_kl": forward_kl, "hard_ce": hard_ce, "tv": tv, "lk_alpha": lk_alpha,
}  # fmt: skip


def rejection_penalty(draft_SD: Tensor, rejected_S: Tensor) -> tuple[Tensor, Tensor]:
    """``-log(1 - q)`` of one token a row (int64 draft ids) and its gradient, for Aurora's negative feedback."""
    q_S1 = draft_SD.gather(-1, rejected_S[:, None])
    odds_S1 = q_S1 / (1 - q_S1).clamp(min=_SMALL)
    grad_SD = (-odds_S1 * draft_SD).scatter_add_(-1, rejected_S[:, None], odds_S1)
    return -torch.log1p(-q_S1.clamp(max=1 - _SMALL))[:, 0], grad_SD
