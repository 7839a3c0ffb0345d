"""Objectives of a training step: for some rows of logits, each row's loss and its gradient.

With draft probabilities q and target probabilities p: soft cross-entropy and its KL divergence (EAGLE-3, section
3.2), cross-entropy of the target's top token, total variation, and the LK losses (arXiv 2602.23881) on the acceptance
rate ``sum(min(p, q))``: ``-log`` of it, and KL blended with total variation. Shapes: K steps, C rows of each, D draft
vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-6


class Rows(NamedTuple):
    """Some rows at each step, float32 or wider. An objective may overwrite ``draft_KCD``."""

    logits_KCD: Tensor
    draft_KCD: Tensor  # softmax of the logits
    lse_KC: Tensor  # log-sum-exp of the logits
    teacher_CD: Tensor  # the target's distribution, over the draft vocabulary alone
    mass_C: Tensor  # what the draft vocabulary holds of the target's whole distribution
    best_C: Tensor  # int64: draft id of the target's top token; 0 where there is none
    kl_weight_K: Tensor  # the paper's lambda at each step, for lk_lambda


class Scored(NamedTuple):
    loss_KC: Tensor
    grad_KCD: Tensor  # with respect to the logits
    rate_KC: Tensor | None = None  # acceptance rate, of an objective that is made of it


Objective = Callable[[Rows], Scored]


def soft_ce(rows: Rows) -> Scored:
    loss_KC = rows.lse_KC - torch.linalg.vecdot(rows.teacher_CD, rows.logits_KCD)
    return Scored(loss_KC, rows.draft_KCD.sub_(rows.teacher_CD))


def forward_kl(rows: Rows) -> Scored:
    loss_KC, grad_KCD, _ = soft_ce(rows)
    return Scored(loss_KC + torch.xlogy(rows.teacher_CD, rows.teacher_CD).sum(-1), grad_KCD)


def hard_ce(rows: Rows) -> Scored:
    best_KC1 = rows.best_C.expand_as(rows.lse_KC)[..., None]
    loss_KC = rows.lse_KC - rows.logits_KCD.gather(-1, best_KC1)[..., 0]
    return Scored(loss_KC, rows.draft_KCD.scatter_add_(-1, best_KC1, torch.full_like(loss_KC, -1.0)[..., None]))


def acceptance_rate(rows: Rows) -> tuple[Tensor, Tensor]:
    """``sum(min(p, q))``, the chance that speculative sampling accepts a token drawn from q, and its gradient."""
    target_CD = rows.teacher_CD * rows.mass_C[:, None]
    below_KCD = rows.draft_KCD < target_CD
    rate_KC = torch.minimum(rows.draft_KCD, target_CD).sum(-1)
    below_mass_KC1 = (rows.draft_KCD * below_KCD).sum(-1, keepdim=True)
    return rate_KC, rows.draft_KCD * (below_KCD.to(rows.draft_KCD.dtype) - below_mass_KC1)


def tv(rows: Rows) -> Scored:
    rate_KC, grad_KCD = acceptance_rate(rows)
    return Scored(1 - rate_KC, grad_KCD.neg_(), rate_KC)


def lk_alpha(rows: Rows) -> Scored:
    rate_KC, grad_KCD = acceptance_rate(rows)
    clamped_KC = rate_KC.clamp(min=_SMALL)
    return Scored(-clamped_KC.log(), grad_KCD.div_(-clamped_KC[..., None]), rate_KC)


def lk_lambda(rows: Rows) -> Scored:
    rate_KC, rate_grad_KCD = acceptance_rate(rows)
    kl_KC, kl_grad_KCD, _ = forward_kl(rows)
    kl_weight_K1 = rows.kl_weight_K[:, None]
    loss_KC = kl_weight_K1 * kl_KC + (1 - kl_weight_K1) * (1 - rate_KC)
    grad_KCD = kl_grad_KCD.mul_(kl_weight_K1[..., None]).sub_(rate_grad_KCD.mul_(1 - kl_weight_K1[..., None]))
    return Scored(loss_KC, grad_KCD, rate_KC)


OBJECTIVES: dict[str, Objective] = {
    "soft_ce": soft_ce, "forward_kl": forward_kl, "hard_ce": hard_ce, "tv": tv, "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}  # fmt: skip
MADE_OF_RATES = (tv, lk_alpha, lk_lambda)


def rejection_penalty(draft_KSD: Tensor, rejected_S: Tensor) -> tuple[Tensor, Tensor]:
    """``-log(1 - q)`` of one token a row (int64 draft ids) and its gradient, for Aurora's negative feedback."""
    rejected_KS1 = rejected_S.expand(draft_KSD.shape[:2])[..., None]
    q_KS1 = draft_KSD.gather(-1, rejected_KS1)
    odds_KS1 = q_KS1 / (1 - q_KS1).clamp(min=_SMALL)
    grad_KSD = (-odds_KS1 * draft_KSD).scatter_add_(-1, rejected_KS1, odds_KS1)
    return -torch.log1p(-q_KS1.clamp(max=1 - _SMALL))[..., 0], grad_KSD
