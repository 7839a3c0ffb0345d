"""The EAGLE3 objective: soft cross-entropy against the target at each step of the training-time test.

Row n of step k predicts the target's distribution over token n+2+k, which is what the target's last hidden state at
its teacher row m = n+1+k gives (EAGLE-3, section 3.2). Logits exist for one chunk of teacher rows at a time, and
only for rows that count; the gradient is made on the way. Shapes: N rows of the pack, C rows of a chunk, H hidden,
V target and D draft vocabulary, K steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.draft import Eagle3Draft
from trainer.sample import Pack

_CHUNK_LOGITS = 1 << 21  # logits in memory at a time


@dataclass(frozen=True)
class FrozenTarget:
    """The target's embedding and head, [V, H] each, on the trainer's device."""

    embed_VH: Tensor
    head_VH: Tensor


@dataclass(frozen=True)
class Unrolled:
    """One pass over a pack: the loss, and what the draft would have achieved."""

    loss: Tensor
    correct_KN: Tensor  # bool: the draft's top choice is the target's
    valid_KN: Tensor  # bool: rows that count at this step

    def acceptance_length(self, steps: int) -> tuple[int, int]:
        """Tokens committed and rows they were counted over, by a greedy chain of ``steps`` drafts (bonus included)."""
        chain_N = self.correct_KN[:steps].int().cumprod(0).sum(0)
        rows_N = self.valid_KN[:steps].all(0)
        return int((1 + chain_N)[rows_N].sum()), int(rows_N.sum())


def unroll(
    draft: Eagle3Draft, target: FrozenTarget, pack: Pack, steps: int, decay: float, generated_only: bool
) -> Unrolled:
    """Run ``steps`` steps of the training-time test.

    The loss of a step is the mean over the rows that count: those with a teacher row and, if ``generated_only``, a
    predicted token past the prompt. A row whose target token the draft vocabulary lacks adds nothing to it. Steps are
    weighted by ``decay**k``.
    """
    teaches_N = pack.first_row_N < torch.arange(pack.first_row_N.numel(), device=pack.first_row_N.device)
    if generated_only:
        teaches_N &= pack.positions_N + 1 >= pack.prompt_N
    rows_M = teaches_N.nonzero().flatten()
    valid_KN = torch.zeros(steps, teaches_N.numel(), dtype=torch.bool, device=teaches_N.device)
    for k in range(steps):
        rows_N = rows_M - 1 - k
        valid_KN[k, rows_N[rows_N >= pack.first_row_N[rows_M]]] = True
    weights_K = [decay**k / max(1, count) for k, count in enumerate(valid_KN.sum(1).tolist())]

    def objective(hidden_KNH: list[Tensor], head_DH: Tensor) -> tuple[Tensor, Tensor]:
        teacher = _Teacher(target.head_VH, pack, draft.target_ids_D, draft.t2d)
        return _ChunkedSoftCrossEntropy.apply(head_DH, teacher, rows_M, weights_K, *hidden_KNH)

    loss, correct_KN = run_draft(draft, target, pack, steps, objective)
    return Unrolled(loss, correct_KN, valid_KN)


def run_draft(draft: Eagle3Draft, target: FrozenTarget, pack: Pack, steps: int, objective: Any) -> Any:
    """The draft over a pack, from the states and tokens that it would read in the server."""
    embed_NH = F.embedding(pack.tokens_N, target.embed_VH).to(pack.aux_N3H.dtype)
    return draft(embed_NH, pack.aux_N3H, pack.positions_N, pack.bounds, steps, objective)


@dataclass(frozen=True)
class _Teacher:
    """The target's choice, made from its last hidden states."""

    head_VH: Tensor
    pack: Pack
    ids_D: Tensor
    t2d_V: Tensor

    def __call__(self, row_C: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution over the draft vocabulary, float32 or wider [C, D], and top token [C]."""
        logits_CV = F.linear(self.pack.last_NH[row_C].to(self.head_VH.dtype), self.head_VH)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        known_CD = logits_CV if self.ids_D.numel() == self.t2d_V.numel() else logits_CV[:, self.ids_D]
        return known_CD.softmax(-1), logits_CV.argmax(-1)


class _ChunkedSoftCrossEntropy(torch.autograd.Function):
    """Weighted loss of all steps, and which top choices are right; gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, head_DH: Tensor, teacher: _Teacher, row_M: Tensor, weights_K: list[float], *hidden_KNH: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(head_DH.dtype, torch.float32)
        loss = head_DH.new_zeros((), dtype=wide)
        correct_KN = head_DH.new_zeros((len(hidden_KNH), hidden_KNH[0].shape[0]), dtype=torch.bool)
        learns = any(ctx.needs_input_grad)
        grad_head_DH = torch.zeros_like(head_DH, dtype=wide) if learns else None
        grads_KNH = [torch.zeros_like(h) if learns else None for h in hidden_KNH]
        for m_C in row_M.split(max(1, _CHUNK_LOGITS // head_DH.shape[0])):
            teacher_CD, best_C = teacher(m_C)
            known_C = teacher.t2d_V[best_C]
            for k, (hidden_NH, weight) in enumerate(zip(hidden_KNH, weights_K, strict=True)):
                # All of the chunk, but for the first rows of a sample: they are too early to teach step k.
                (some_C,) = (m_C - 1 - k >= teacher.pack.first_row_N[m_C]).nonzero(as_tuple=True)
                whole = some_C.numel() == m_C.numel()
                n_C, teacher_SD = m_C[some_C] - 1 - k, teacher_CD if whole else teacher_CD[some_C]
                hidden_SH = hidden_NH[n_C]
                logits_SD = F.linear(hidden_SH, head_DH).to(wide)
                correct_KN[k, n_C] = teacher.ids_D[logits_SD.argmax(-1)] == best_C[some_C]
                weight_S = known_C[some_C].to(wide) * weight
                top_S1 = logits_SD.amax(-1, keepdim=True)
                exp_SD = (logits_SD - top_S1).exp_()
                sum_S1 = exp_SD.sum(-1, keepdim=True)
                lse_S = (sum_S1.log() + top_S1)[:, 0]
                loss += ((lse_S - torch.linalg.vecdot(teacher_SD, logits_SD)) * weight_S).sum()
                if learns:
                    grad_SD = exp_SD.div_(sum_S1).sub_(teacher_SD).mul_(weight_S[:, None]).to(head_DH.dtype)
                    grads_KNH[k][n_C] = grad_SD @ head_DH
                    grad_head_DH += grad_SD.mT @ hidden_SH
        if learns:
            ctx.save_for_backward(grad_head_DH.to(head_DH.dtype), *grads_KNH)
        ctx.mark_non_differentiable(correct_KN)
        return loss, correct_KN

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        head_DH, *hidden_KNH = ctx.saved_tensors
        return grad * head_DH, None, None, None, *(grad.to(h.dtype) * h for h in hidden_KNH)
