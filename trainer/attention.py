"""Attention of the training-time test over packed samples; no mask over rows is ever built.

Row t of step k attends to the true prefix of its sample (step-0 keys up to t) and to its own key of each later
step (EAGLE-3, section 3.2). The prefix part is FlashAttention, sample by sample; the few own keys are merged into
it by their log-sum-exp. FlashAttention's backward needs only the final output and log-sum-exp of a row, so it serves
the merged softmax as it is. Where PyTorch offers no flash operator with that interface (today: off the CPU), the
prefix of one sample at a time goes through plain matrices. Shapes: N rows of the pack, T rows of a sample, Q heads,
P head size.
"""

import torch
from torch import Tensor

Bounds = list[tuple[int, int]]  # first row of each sample, and the row after its last


def attend(q_QNP: Tensor, keys: list[Tensor], values: list[Tensor], bounds: Bounds) -> Tensor:
    """Attention output [Q, N, P]; ``keys[0]`` and ``values[0]`` are step 0's, the others the later steps' own."""
    chain = [tensor for pair in zip(keys[1:], values[1:], strict=True) for tensor in pair]
    return _PrefixAndChain.apply(q_QNP, keys[0], values[0], bounds, *chain)


class _PrefixAndChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_QNP: Tensor, k_QNP: Tensor, v_QNP: Tensor, bounds: Bounds, *chain: Tensor) -> Tensor:
        scale = q_QNP.shape[-1] ** -0.5
        out_QNP, lse_QN = torch.empty_like(q_QNP), q_QNP.new_empty(q_QNP.shape[:2], dtype=_accumulated(q_QNP))
        for rows in (slice(*b) for b in bounds):
            out, lse = _prefix_forward(q_QNP[:, rows], k_QNP[:, rows], v_QNP[:, rows], scale)
            out_QNP[:, rows], lse_QN[:, rows] = out, lse
        if chain:
            own_KQN = torch.stack([_own_scores(q_QNP, k, scale) for k in chain[::2]])
            all_lse_QN = torch.logaddexp(lse_QN, own_KQN.logsumexp(0))
            out_QNP = out_QNP * (lse_QN - all_lse_QN).exp()[..., None].to(out_QNP.dtype)
            for own_QN, value_QNP in zip(own_KQN, chain[1::2], strict=True):
                out_QNP += (own_QN - all_lse_QN).exp()[..., None].to(out_QNP.dtype) * value_QNP
            lse_QN = all_lse_QN
        ctx.bounds = bounds
        ctx.save_for_backward(q_QNP, k_QNP, v_QNP, out_QNP, lse_QN, *chain)
        return out_QNP

    @staticmethod
    def backward(ctx, grad_QNP: Tensor) -> tuple[Tensor | None, ...]:
        q_QNP, k_QNP, v_QNP, out_QNP, lse_QN, *chain = ctx.saved_tensors
        scale = q_QNP.shape[-1] ** -0.5
        dq_QNP, dk_QNP, dv_QNP = (torch.empty_like(t) for t in (q_QNP, k_QNP, v_QNP))
        for rows in (slice(*b) for b in ctx.bounds):
            given = (t[:, rows] for t in (grad_QNP, q_QNP, k_QNP, v_QNP, out_QNP, lse_QN))
            dq_QNP[:, rows], dk_QNP[:, rows], dv_QNP[:, rows] = _prefix_backward(*given, scale)
        chain_grads: list[Tensor] = []
        if chain:
            mean_QN = (grad_QNP * out_QNP).sum(-1, dtype=lse_QN.dtype)
        for key_QNP, value_QNP in zip(chain[::2], chain[1::2], strict=True):
            prob_QN = (_own_scores(q_QNP, key_QNP, scale) - lse_QN).exp()
            dscore_QN = prob_QN * ((grad_QNP * value_QNP).sum(-1, dtype=lse_QN.dtype) - mean_QN) * scale
            dscore_QN1 = dscore_QN[..., None].to(q_QNP.dtype)
            dq_QNP += dscore_QN1 * key_QNP
            chain_grads += [dscore_QN1 * q_QNP, prob_QN[..., None].to(q_QNP.dtype) * grad_QNP]
        return dq_QNP, dk_QNP, dv_QNP, None, *chain_grads


def _own_scores(q_QNP: Tensor, k_QNP: Tensor, scale: float) -> Tensor:
    return (q_QNP * k_QNP).sum(-1, dtype=_accumulated(q_QNP)) * scale


def _accumulated(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _prefix_forward(q_QTP: Tensor, k_QTP: Tensor, v_QTP: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention within one sample, and its log-sum-exp [Q, T]."""
    if _has_flash(q_QTP):
        given = (t[None] for t in (q_QTP, k_QTP, v_QTP))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, True, scale=scale)
        return out[0], lse[0]
    scores_QTT = _causal_scores(q_QTP, k_QTP, scale)
    lse_QT = scores_QTT.logsumexp(-1)
    return (scores_QTT - lse_QT[..., None]).exp().to(v_QTP.dtype) @ v_QTP, lse_QT


def _prefix_backward(
    grad_QTP: Tensor, q_QTP: Tensor, k_QTP: Tensor, v_QTP: Tensor, out_QTP: Tensor, lse_QT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``lse`` may be those of a softmax over more than the prefix."""
    if _has_flash(q_QTP):
        given = (t[None] for t in (grad_QTP, q_QTP, k_QTP, v_QTP, out_QTP, lse_QT))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, True, scale=scale)
        return tuple(g[0] for g in grads)
    prob_QTT = (_causal_scores(q_QTP, k_QTP, scale) - lse_QT[..., None]).exp()
    mean_QT1 = (grad_QTP * out_QTP).sum(-1, keepdim=True, dtype=lse_QT.dtype)
    dscore_QTT = (prob_QTT * ((grad_QTP @ v_QTP.mT) - mean_QT1) * scale).to(q_QTP.dtype)
    return dscore_QTT @ k_QTP, dscore_QTT.mT @ q_QTP, prob_QTT.to(grad_QTP.dtype).mT @ grad_QTP


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _causal_scores(q_QTP: Tensor, k_QTP: Tensor, scale: float) -> Tensor:
    future_TT = torch.ones(q_QTP.shape[1], k_QTP.shape[1], dtype=torch.bool, device=q_QTP.device).triu(1)
    return ((q_QTP @ k_QTP.mT).to(_accumulated(q_QTP)) * scale).masked_fill(future_TT, float("-inf"))
