"""The loss over all steps of the training-time test, and its gradient.

Row n of step k predicts the target's distribution over token n+2+k, which is what the target's last hidden state at
its teacher row m = n+1+k gives (EAGLE-3, section 3.2). Logits exist for one chunk of teacher rows at a time, and
only for rows that count; the gradient is made on the way. Shapes: N rows of the pack, C rows of a chunk, H hidden,
V target and D draft vocabulary, K steps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_specforge.training_settings import TrainingSettings
from trainer import objectives
from trainer.draft import Begun, Draft
from trainer.sample import Pack

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # in memory at a time: enough to fill the device
_LEAST_ROWS = 8


@dataclass(frozen=True)
class FrozenTarget:
    """The target's embedding and head, [V, H] each, on the trainer's device."""

    embed_VH: Tensor
    head_VH: Tensor

    def embed(self, tokens_N: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens_N, self.embed_VH).to(dtype)


@dataclass(frozen=True)
class Goal:
    """What is minimised: the objective of each step, its weight there, and how rejections count."""

    objectives_K: list[objectives.Objective]
    weights_K: list[float]
    generated_only: bool = True
    rejection_weight: float = 0.0
    rejection_penalty: float = 0.0

    @classmethod
    def of(cls, settings: TrainingSettings, rows_K: list[int], acceptance_K: list[float]) -> "Goal":
        """``rows_K`` is what each step's loss is a mean over; ``acceptance_K`` each step's acceptance rate so far."""
        if settings.objective == "lk_lambda":
            chosen = [objectives.LkLambda(math.exp(-settings.lk_decay * rate)) for rate in acceptance_K]
        else:
            chosen = [objectives.OBJECTIVES[settings.objective]] * settings.ttt_steps
        weights_K = [weight / max(1, rows) for weight, rows in zip(settings.step_weights, rows_K, strict=True)]
        return cls(
            chosen, weights_K, settings.loss_on == "generated", settings.rejection_weight, settings.rejection_penalty
        )


@dataclass(frozen=True)
class Unrolled:
    """One pass over a pack."""

    loss: Tensor
    correct_K: Tensor  # int64: of the rows that count at each step, those whose top choice is the target's


def unroll(draft: Draft, target: FrozenTarget, pack: Pack, goal: Goal) -> Unrolled:
    """Run the training-time test over a pack.

    Rows that count have a teacher row and, if ``goal.generated_only``, predict a token past the prompt. A row whose
    target token the draft vocabulary lacks adds nothing to the loss.
    """
    teaches_N = pack.first_row_N < torch.arange(pack.first_row_N.numel(), device=pack.first_row_N.device)
    if goal.generated_only:
        teaches_N &= pack.generated_N
    rows_M = teaches_N.nonzero().flatten()

    def lose(begun: Begun) -> tuple[Tensor, ...]:
        teacher = Teacher(draft, target, pack)
        return _ChunkedLoss.apply(draft.lm_head.weight, teacher, rows_M, goal, *begun.unroll(len(goal.weights_K)))

    return Unrolled(*run_draft(draft, target, pack, lose))


def run_draft(draft: Draft, target: FrozenTarget, pack: Pack, use: Callable[[Begun], Any]) -> Any:
    """The draft over a pack, from the states and tokens that it would read in the server."""
    return draft(target.embed(pack.tokens_N, pack.aux_N3H.dtype), pack.aux_N3H, pack.positions_N, pack.bounds, use)


class Taught(NamedTuple):
    """What the target says at some teacher rows."""

    row_C: Tensor  # int64, of the pack
    teacher_CD: Tensor  # its distribution over the draft vocabulary alone
    mass_C: Tensor  # that vocabulary's share of the whole distribution
    best_C: Tensor  # int64: draft id of its top token
    known_C: Tensor  # bool: there is such a draft id
    rejected_C: Tensor  # int64: draft id of the token that it refused when it was served
    refused_C: Tensor  # bool: there was one
    before_C: Tensor  # int64: rows of its sample before it

    def learners(self, k: int) -> tuple[Tensor, Tensor]:
        """The row that each teaches at step ``k``, and whether it is of the same sample; any other counts for nothing.

        Rows are not picked out by that: on a GPU, it would have to be waited for.
        """
        return (self.row_C - 1 - k).clamp(min=0), self.before_C > k


class Teacher:
    """The target's choice, made from its last hidden states."""

    def __init__(self, draft: Draft, target: FrozenTarget, pack: Pack) -> None:
        self.pack = pack
        self._head_VH, self._ids_D, self._t2d_V = target.head_VH, draft.target_ids_D, draft.t2d
        self._draft_id_V = draft.t2d.cumsum(0) - 1  # draft ids follow the order of the target's

    def in_chunks(self, row_M: Tensor) -> Iterator[Taught]:
        """The teacher rows, so many at a time that their logits stay small."""
        for row_C in row_M.split(_chunk_rows(self._head_VH, self._ids_D.numel())):
            yield self._taught(row_C)

    def draft_ids(self, token_C: Tensor) -> tuple[Tensor, Tensor]:
        """Draft ids of tokens, and which of them the draft vocabulary has; -1 is no token."""
        known_C = (token_C >= 0) & self._t2d_V[token_C]
        return self._draft_id_V[token_C].where(known_C, 0), known_C

    def _taught(self, row_C: Tensor) -> Taught:
        logits_CV = F.linear(self.pack.last_NH[row_C].to(self._head_VH.dtype), self._head_VH)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        best = self.draft_ids(logits_CV.argmax(-1))
        rejected, before_C = self.draft_ids(self.pack.rejected_N[row_C]), row_C - self.pack.first_row_N[row_C]
        known_CD, mass_C = logits_CV, torch.ones_like(logits_CV[:, 0])
        if self._ids_D.numel() < self._t2d_V.numel():
            known_CD = logits_CV[:, self._ids_D]
            mass_C = (known_CD.logsumexp(-1) - logits_CV.logsumexp(-1)).exp()
        return Taught(row_C, known_CD.softmax(-1), mass_C, *best, *rejected, before_C)


def _chunk_rows(head_VH: Tensor, D: int) -> int:
    """So many that a chunk takes the same memory whatever the vocabularies: the target's logits, the draft's twice."""
    return max(_LEAST_ROWS, _CHUNK_LOGITS[head_VH.device.type] // (head_VH.shape[0] + 2 * D))


class _ChunkedLoss(torch.autograd.Function):
    """Weighted loss of all steps; gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, head_DH: Tensor, teacher: Teacher, row_M: Tensor, goal: Goal, *hidden_KNH: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(head_DH.dtype, torch.float32)
        loss = head_DH.new_zeros((), dtype=wide)
        correct_K = torch.zeros(len(hidden_KNH), dtype=torch.int64, device=head_DH.device)
        grad_head_DH = torch.zeros_like(head_DH, dtype=wide)
        grads_KNH = [torch.zeros_like(h) for h in hidden_KNH]
        for chunk in teacher.in_chunks(row_M):
            weight_C = chunk.known_C * (1 + goal.rejection_weight * chunk.refused_C).to(wide)
            for k, hidden_NH in enumerate(hidden_KNH):
                n_C, counts_C = chunk.learners(k)
                hidden_CH = hidden_NH[n_C]
                loss_C, grad_CD, right_C = _loss_of_rows(
                    F.linear(hidden_CH, head_DH).to(wide), chunk, counts_C, goal.objectives_K[k], goal
                )
                correct_K[k] += (right_C & counts_C).sum()
                # The weights go onto the smaller factors of the two products.
                weight_kC = weight_C * counts_C * goal.weights_K[k]
                loss += loss_C @ weight_kC
                grad_CD, weight_C1 = grad_CD.to(head_DH.dtype), weight_kC[:, None].to(head_DH.dtype)
                grads_KNH[k].index_add_(0, n_C, (grad_CD @ head_DH).mul_(weight_C1))
                _add_product(grad_head_DH, grad_CD.mT, hidden_CH * weight_C1)
        ctx.save_for_backward(grad_head_DH.to(head_DH.dtype), *grads_KNH)
        ctx.mark_non_differentiable(correct_K)
        return loss, correct_K

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # Made for this pass alone, so they are scaled where they are.
        head_DH, *hidden_KNH = (t.mul_(grad.to(t.dtype)) for t in ctx.saved_tensors)
        return head_DH, None, None, None, *hidden_KNH


def _loss_of_rows(
    logits_CD: Tensor, taught: Taught, counts_C: Tensor, objective: objectives.Objective, goal: Goal
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C] and its gradient [C, D] of rows that predict what ``taught`` says; whether the top choice is right."""
    top_C, choice_C = logits_CD.max(-1)
    draft_CD = logits_CD.softmax(-1)
    lse_C = top_C - draft_CD.gather(-1, choice_C[:, None])[:, 0].log()
    extra = None
    if goal.rejection_penalty and (refused_R := taught.refused_C.nonzero().flatten()).numel():
        extra = objectives.rejection_penalty(draft_CD[refused_R], taught.rejected_C[refused_R])
    rows = objectives.Rows(logits_CD, draft_CD, lse_C, taught.teacher_CD, taught.mass_C, taught.best_C, counts_C)
    loss_C, grad_CD = objective(rows)
    if extra is not None:
        loss_C = loss_C.index_add(0, refused_R, extra[0], alpha=goal.rejection_penalty)
        grad_CD = grad_CD.index_add_(0, refused_R, extra[1], alpha=goal.rejection_penalty)
    return loss_C, grad_CD, (choice_C == taught.best_C) & taught.known_C


def _add_product(sum_DH: Tensor, a_DS: Tensor, b_SH: Tensor) -> None:
    if sum_DH.dtype == a_DS.dtype:
        sum_DH.addmm_(a_DS, b_SH)
    else:
        sum_DH += a_DS @ b_SH
