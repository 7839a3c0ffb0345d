"""The EAGLE3 objective: soft cross-entropy against the target at each step of the training-time test.

Row t of step k predicts the target's distribution over token t+2+k, which is what the target's last hidden
state at row t+1+k gives (EAGLE-3, section 3.2). Shapes: B samples, L rows, H hidden, V target and D draft
vocabulary, N selected rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.draft import Eagle3Draft
from trainer.sample import Batch


@dataclass(frozen=True)
class FrozenTarget:
    """The target's embedding and head, [V, H] each, on the trainer's device."""

    embed_VH: Tensor
    head_VH: Tensor


@dataclass(frozen=True)
class Unrolled:
    """One pass over a batch: the loss, and what the draft would have achieved."""

    loss: Tensor
    correct_KN: Tensor  # bool [steps, B*L]: the draft's top choice is the target's
    valid_KN: Tensor  # bool: rows that count at this step

    def acceptance_length(self, steps: int) -> tuple[int, int]:
        """Tokens committed and rows they were counted over, by a greedy chain of ``steps`` drafts (bonus included)."""
        chain_N = self.correct_KN[:steps].int().cumprod(0).sum(0)
        rows_N = self.valid_KN[:steps].all(0)
        return int((1 + chain_N)[rows_N].sum()), int(rows_N.sum())


def unroll(
    draft: Eagle3Draft, target: FrozenTarget, batch: Batch, steps: int, decay: float, generated_only: bool
) -> Unrolled:
    """Run ``steps`` steps of the training-time test; rows without a teacher, or in the prompt, count for nothing."""
    logits_KBLD = draft_logits(draft, target, batch, steps)
    draft_ids_D = draft.target_ids_D
    teacher_BLD, best_BL = _teach(target.head_VH, batch.last_BLH, draft_ids_D, draft.t2d)
    row_L = torch.arange(batch.tokens_BL.shape[1], device=draft_ids_D.device)
    loss, correct, valid = torch.zeros((), device=draft_ids_D.device), [], []
    for k, logits_BLD in enumerate(logits_KBLD):
        shift = 1 + k
        counts_BL = row_L + shift < batch.lengths_B[:, None]
        if generated_only:
            counts_BL = counts_BL & (batch.positions_BL + shift + 1 >= batch.prompt_B[:, None])
        target_best_BL = F.pad(best_BL, (0, shift), value=-1)[:, shift:]
        correct.append((draft_ids_D[logits_BLD.argmax(-1)] == target_best_BL).flatten())
        valid.append(counts_BL.flatten())
        learn_N = (counts_BL & draft.t2d[target_best_BL.clamp(min=0)]).flatten().nonzero().flatten()
        teacher_ND = teacher_BLD.flatten(0, 1)[learn_N + shift]
        log_ND = logits_BLD.flatten(0, 1)[learn_N].float().log_softmax(-1)
        loss = loss - decay**k * (teacher_ND * log_ND).sum() / max(1, learn_N.numel())
    return Unrolled(loss, torch.stack(correct), torch.stack(valid))


def draft_logits(draft: Eagle3Draft, target: FrozenTarget, batch: Batch, steps: int) -> list[Tensor]:
    """The draft's logits [B, L, D] at each step, from the states and tokens it would read in the server."""
    embed_BLH = F.embedding(batch.tokens_BL, target.embed_VH).to(batch.aux_BL3H.dtype)
    return draft(F.pad(embed_BLH, (0, 0, 0, 1))[:, 1:], batch.aux_BL3H, batch.positions_BL, steps)


@torch.no_grad()
def _teach(head_VH: Tensor, last_BLH: Tensor, draft_ids_D: Tensor, t2d_V: Tensor) -> tuple[Tensor, Tensor]:
    """The target's distribution over the draft vocabulary, float32 [B, L, D], and its top token [B, L]."""
    logits_BLV = F.linear(last_BLH.to(head_VH.dtype), head_VH).float()
    known_BLD = logits_BLV if t2d_V.all() else logits_BLV[..., draft_ids_D]
    return known_BLD.softmax(-1), logits_BLV.argmax(-1)
