"""The loss over all steps of the training-time test, and its gradient.

Row n of step k predicts the target's distribution over token n+2+k, which is what the target's last hidden state at
its teacher row m = n+1+k gives (EAGLE-3, section 3.2). Logits exist for one chunk of teacher rows at a time, and
only for rows that count; the gradient is made on the way. Shapes: N rows of the pack, L roots of chains among them, C
rows of a chunk, H hidden, V target and D draft vocabulary, K steps.
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
from trainer.fused import fusable, top, wide
from trainer.mfu import pass_flops
from trainer.roots import Roots, rows_of
from trainer.sample import Pack

_CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}  # in memory at a time: enough to fill the device
_LEAST_LOGITS_ROWS = 8  # of the draft's


@dataclass(frozen=True)
class FrozenTarget:
    """The target's embedding and head, [V, H] each, on the trainer's device."""

    embed_VH: Tensor
    head_VH: Tensor
    softcap: float | None = None  # of its logits (``target.final_softcap``)

    def embed(self, tokens_N: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens_N, self.embed_VH).to(dtype)


@dataclass(frozen=True)
class Goal:
    """What is minimised: the objective, its weights at each step, and how rejections count."""

    objective: objectives.Objective
    weights_K: list[float]
    kl_weights_K: list[float]
    generated_only: bool = True
    rejection_weight: float = 0.0
    rejection_penalty: float = 0.0

    @classmethod
    def of(cls, settings: TrainingSettings, rows_K: list[int], acceptance_K: list[float]) -> "Goal":
        """``rows_K`` is what each step's loss is a mean over; ``acceptance_K`` each step's acceptance rate so far."""
        return cls(
            objectives.OBJECTIVES[settings.objective],
            [weight / max(1, rows) for weight, rows in zip(settings.step_weights, rows_K, strict=True)],
            [math.exp(-settings.lk_decay * rate) for rate in acceptance_K],
            settings.loss_on == "generated",
            settings.rejection_weight,
            settings.rejection_penalty,
        )


@dataclass(frozen=True)
class Unrolled:
    """One pass over a pack."""

    loss: Tensor
    flops: int  # see ``trainer.mfu``
    correct_K: Tensor  # int64: of the rows that count at each step, those whose top choice is the target's
    rate_K: Tensor  # the sum of their acceptance rates, of an objective that is made of it; or else zero


def unroll(draft: Draft, target: FrozenTarget, pack: Pack, goal: Goal) -> Unrolled:
    """Run the training-time test over a pack.

    Rows that count have a teacher row and, if ``goal.generated_only``, predict a token past the prompt. A row whose
    target token the draft vocabulary lacks adds nothing to the loss.
    """
    steps, taught = len(goal.weights_K), pack.taught(goal.generated_only)
    roots = Roots.of_chains_to(taught, len(pack.tokens_N), steps, pack.tokens_N.device)
    teacher, row_M = Teacher(draft, target, pack), rows_of(taught, roots.device)

    def lose(begun: Begun) -> tuple[Tensor, ...]:
        return _ChunkedLoss.apply(draft.lm_head.weight, teacher, row_M, roots, goal, *begun.unroll(steps))

    loss, *counts = run_draft(draft, target, pack, roots, lose)
    flops = pass_flops(draft, roots, steps, row_M.numel(), teacher.rows_given, target.head_VH.numel())
    return Unrolled(loss, flops, *counts)


def run_draft(draft: Draft, target: FrozenTarget, pack: Pack, roots: Roots, use: Callable[[Begun], Any]) -> Any:
    """The draft over a pack, from the states and embeddings that it would read in the server."""
    embed_NH = target.embed(pack.tokens_N.clamp(min=0), pack.aux_N3H.dtype)
    if pack.embeds_MH.numel():
        embed_NH.masked_scatter_((pack.tokens_N < 0)[:, None], pack.embeds_MH)
    on_axes = draft.turns_by_axes and pack.positions_N3 is not None
    return draft(embed_NH, pack.aux_N3H, pack.positions_N3 if on_axes else pack.positions_N, roots, use)


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

    def known(self) -> "Taught":
        """Those whose top token the draft vocabulary has. On a GPU it is waited for how many: once for all steps."""
        known_S = self.known_C.nonzero().flatten()
        return self if known_S.numel() == self.known_C.numel() else Taught(*(t[known_S] for t in self))


class Teacher:
    """The target's choice, made from its last hidden states."""

    def __init__(self, draft: Draft, target: FrozenTarget, pack: Pack) -> None:
        self.pack = pack
        self._head_VH, self._ids_D, self._t2d_V = target.head_VH, draft.target_ids_D, draft.t2d
        self._softcap = target.softcap
        self._draft_id_V = draft.t2d.cumsum(0) - 1  # draft ids follow the order of the target's
        self.rows_given = 0

    def in_chunks(self, row_M: Tensor, steps: int = 1, known_only: bool = False) -> Iterator[Taught]:
        """The teacher rows, so many at a time that logits stay small: theirs, and those of ``steps`` drafts of each.

        With ``known_only``, without those whose top token the draft vocabulary lacks.
        """
        some_unknown = self._ids_D.numel() < self._t2d_V.numel()
        for row_C in row_M.split(_chunk_rows(self._head_VH, steps, self._ids_D.numel())):
            taught = self._taught(row_C)
            if known_only and some_unknown:
                taught = taught.known()
            self.rows_given += taught.row_C.numel()
            yield taught

    def draft_ids(self, token_C: Tensor) -> tuple[Tensor, Tensor]:
        """Draft ids of tokens, and which of them the draft vocabulary has; -1 is no token."""
        known_C = (token_C >= 0) & self._t2d_V[token_C]
        return self._draft_id_V[token_C].where(known_C, 0), known_C

    def _taught(self, row_C: Tensor) -> Taught:
        logits_CV = F.linear(self.pack.last_NH[row_C].to(self._head_VH.dtype), self._head_VH)
        ids_D = self._ids_D if self._ids_D.numel() < self._t2d_V.numel() else None
        teacher_CD, mass_C, best_C = _distribution(logits_CV, ids_D, self._softcap)
        rejected, before_C = self.draft_ids(self.pack.rejected_N[row_C]), row_C - self.pack.first_row_N[row_C]
        return Taught(row_C, teacher_CD, mass_C, *self.draft_ids(best_C), *rejected, before_C)


def _chunk_rows(head_VH: Tensor, steps: int, draft_vocab: int) -> int:
    """So many that a chunk takes the same memory whatever the vocabularies: the target's logits, the draft's thrice."""
    rows = _CHUNK_LOGITS[head_VH.device.type] // (head_VH.shape[0] + 3 * steps * draft_vocab)
    return max(rows, math.ceil(_LEAST_LOGITS_ROWS / steps))


@fusable
def _distribution(logits_CV: Tensor, ids_D: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The target's distribution over the draft vocabulary [C, D], that vocabulary's share of it, and its top token."""
    logits_CV = logits_CV.to(wide(logits_CV.dtype))
    if softcap:
        logits_CV = (logits_CV / softcap).tanh_().mul_(softcap)
    _, best_C = top(logits_CV)
    if ids_D is None:
        return logits_CV.softmax(-1), torch.ones_like(logits_CV[:, 0]), best_C
    known_CD = logits_CV[:, ids_D]
    return known_CD.softmax(-1), (known_CD.logsumexp(-1) - logits_CV.logsumexp(-1)).exp(), best_C


class _ChunkedLoss(torch.autograd.Function):
    """Weighted loss of all steps; gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, head_DH: Tensor, teacher: Teacher, row_M: Tensor, roots: Roots, goal: Goal, *hidden_KLH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, dtype = len(hidden_KLH), wide(head_DH.dtype)
        given_2K = torch.tensor([goal.weights_K, goal.kl_weights_K], dtype=torch.float64)
        weight_K, kl_weight_K = given_2K.to(head_DH.device, dtype, non_blocking=True)
        loss, rate_K = head_DH.new_zeros((), dtype=dtype), head_DH.new_zeros(steps, dtype=dtype)
        correct_K = torch.zeros(steps, dtype=torch.int64, device=head_DH.device)
        grad_head_DH = torch.zeros_like(head_DH, dtype=dtype)
        grads_KLH = [torch.zeros_like(h) for h in hidden_KLH]
        known_only = goal.objective not in objectives.MADE_OF_RATES  # or else rates of the others are of interest too
        for chunk in teacher.in_chunks(row_M, steps, known_only):
            n_KC, counts_KC = map(torch.stack, zip(*(chunk.learners(k) for k in range(steps)), strict=True))
            at_KC = roots.place_N[n_KC]
            hidden_SH = torch.cat([hidden_LH[at_C] for hidden_LH, at_C in zip(hidden_KLH, at_KC, strict=True)])
            logits_KCD = F.linear(hidden_SH, head_DH).unflatten(0, at_KC.shape)
            scored, right_KC = _score(
                goal.objective, logits_KCD, chunk.teacher_CD, chunk.mass_C, chunk.best_C, kl_weight_K
            )
            if goal.rejection_penalty:
                _penalise(scored, logits_KCD, chunk, goal.rejection_penalty)
            correct_K += (right_KC & chunk.known_C & counts_KC).sum(-1)
            if scored.rate_KC is not None:
                rate_K += (scored.rate_KC * counts_KC).sum(-1)
            # The weights go onto the smaller factors of the two products.
            weight_C = chunk.known_C * (1 + goal.rejection_weight * chunk.refused_C).to(dtype)
            weight_KC = weight_C * counts_KC * weight_K[:, None]
            loss += (scored.loss_KC * weight_KC).sum()
            grad_SD, weight_S1 = scored.grad_KCD.flatten(0, 1), weight_KC.flatten()[:, None].to(head_DH.dtype)
            dhidden_KCH = (grad_SD @ head_DH).mul_(weight_S1).unflatten(0, at_KC.shape)
            for grad_LH, at_C, dhidden_CH in zip(grads_KLH, at_KC, dhidden_KCH, strict=True):
                grad_LH.index_add_(0, at_C, dhidden_CH)
            _add_product(grad_head_DH, grad_SD.mT, hidden_SH * weight_S1)
        ctx.save_for_backward(grad_head_DH.to(head_DH.dtype), *grads_KLH)
        ctx.mark_non_differentiable(correct_K, rate_K)
        return loss, correct_K, rate_K

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Made for this pass alone, so they are scaled where they are.
        head_DH, *hidden_KLH = (t.mul_(grad.to(t.dtype)) for t in ctx.saved_tensors)
        return head_DH, None, None, None, None, *hidden_KLH


@fusable
def _score(
    objective: objectives.Objective,
    logits_KCD: Tensor,
    teacher_CD: Tensor,
    mass_C: Tensor,
    best_C: Tensor,
    kl_weight_K: Tensor,
) -> tuple[objectives.Scored, Tensor]:
    """What the objective says, the gradient in the logits' dtype; and whether the top choice is ``best_C``."""
    wide_KCD = logits_KCD.to(wide(logits_KCD.dtype))
    top_KC, choice_KC = top(wide_KCD)
    draft_KCD = wide_KCD.softmax(-1)
    if torch.compiler.is_compiling():
        lse_KC = wide_KCD.logsumexp(-1)  # shares its sums with the softmax
    else:
        lse_KC = top_KC - draft_KCD.gather(-1, choice_KC[..., None])[..., 0].log()
    scored = objective(objectives.Rows(wide_KCD, draft_KCD, lse_KC, teacher_CD, mass_C, best_C, kl_weight_K))
    return scored._replace(grad_KCD=scored.grad_KCD.to(logits_KCD.dtype)), choice_KC == best_C


def _penalise(scored: objectives.Scored, logits_KCD: Tensor, taught: Taught, weight: float) -> None:
    """Add the penalty of the rows where the target refused a token when it was served."""
    refused_S = taught.refused_C.nonzero().flatten()
    draft_KSD = logits_KCD[:, refused_S].to(scored.loss_KC.dtype).softmax(-1)
    loss_KS, grad_KSD = objectives.rejection_penalty(draft_KSD, taught.rejected_C[refused_S])
    scored.loss_KC.index_add_(1, refused_S, loss_KS, alpha=weight)
    scored.grad_KCD.index_add_(1, refused_S, grad_KSD.to(scored.grad_KCD.dtype), alpha=weight)


def _add_product(sum_DH: Tensor, a_DS: Tensor, b_SH: Tensor) -> None:
    if sum_DH.dtype == a_DS.dtype:
        sum_DH.addmm_(a_DS, b_SH)
    else:
        sum_DH += a_DS @ b_SH
