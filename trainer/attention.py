"""Attention of the training-time test over packed samples; no mask over rows and steps is ever built.

Row t of step k attends to the true prefix of its sample (step-0 keys up to t) and to its own key of each later
step (EAGLE-3, section 3.2): the prefix part is causal attention over the pack, and the few own keys are merged into it
by their log-sum-exp. On a CPU the prefix part is PyTorch's FlashAttention, sample by sample, whose backward needs only
the final output and log-sum-exp of a row and so serves the merged softmax as it is. Elsewhere it is flex_attention,
compiled, over all samples at once. Shapes: N rows of the pack, T rows of a sample, G key heads, R query heads to a key
head, P head size.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from trainer.fused import fusable, wide

Bounds = list[tuple[int, int]]  # first row of each sample, and the row after its last


def attend(q_QNP: Tensor, keys: list[Tensor], values: list[Tensor], bounds: Bounds) -> Tensor:
    """Attention output [Q, N, P]; ``keys[0]`` and ``values[0]`` [G, N, P] are step 0's, the others the later steps'."""
    q_GRNP = q_QNP.unflatten(0, (keys[0].shape[0], -1))
    attend_merged = attend_by_flash if q_QNP.device.type == "cpu" else attend_by_flex
    return attend_merged(q_GRNP, keys, values, bounds).flatten(0, 1)


def attend_by_flash(q_GRNP: Tensor, keys: list[Tensor], values: list[Tensor], bounds: Bounds) -> Tensor:
    return _PrefixAndChain.apply(q_GRNP, keys[0], values[0], bounds, *_pairs(keys, values))


def attend_by_flex(
    q_GRNP: Tensor, keys: list[Tensor], values: list[Tensor], bounds: Bounds, flex: Any = None
) -> Tensor:
    """``flex`` stands in for the compiled ``flex_attention``."""
    G, R, N, P = q_GRNP.shape
    given = (q_GRNP.reshape(1, G * R, N, P), keys[0][None], values[0][None])
    mask = _causal_within_samples(tuple(bounds), N, q_GRNP.device)
    out, aux = (flex or _compiled_flex())(*given, block_mask=mask, enable_gqa=R > 1, return_aux=AuxRequest(lse=True))
    out_GRNP, lse_GRN = out[0].view(q_GRNP.shape), aux.lse[0].view(G, R, N)
    if len(keys) == 1:
        return out_GRNP
    return _Chain.apply(q_GRNP, out_GRNP, lse_GRN, *_pairs(keys, values))


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=4)
def _causal_within_samples(bounds: tuple[tuple[int, int], ...], rows: int, device: torch.device) -> BlockMask:
    lengths = torch.tensor([end - start for start, end in bounds])
    sample_N = torch.arange(len(bounds)).repeat_interleave(lengths).to(device)

    def attends(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sample_N[query] == sample_N[key])

    return create_block_mask(attends, None, None, rows, rows, device=device)


class _PrefixAndChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GRNP: Tensor, k_GNP: Tensor, v_GNP: Tensor, bounds: Bounds, *chain: Tensor) -> Tensor:
        scale = q_GRNP.shape[-1] ** -0.5
        out_GRNP = torch.empty_like(q_GRNP)
        lse_GRN = q_GRNP.new_empty(q_GRNP.shape[:3], dtype=wide(q_GRNP.dtype))
        for rows in (slice(*b) for b in bounds):
            given = _expanded(q_GRNP[:, :, rows], k_GNP[:, rows], v_GNP[:, rows])
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, True, scale=scale)
            out_GRNP[:, :, rows], lse_GRN[:, :, rows] = out, lse
        if chain:
            lse_GRN = _merge(q_GRNP, out_GRNP, lse_GRN, chain)
        ctx.bounds = bounds
        ctx.save_for_backward(q_GRNP, k_GNP, v_GNP, out_GRNP, lse_GRN, *chain)
        return out_GRNP

    @staticmethod
    def backward(ctx: Any, grad_GRNP: Tensor) -> tuple[Tensor | None, ...]:
        q_GRNP, k_GNP, v_GNP, out_GRNP, lse_GRN, *chain = ctx.saved_tensors
        scale = q_GRNP.shape[-1] ** -0.5
        dq_GRNP, dk_GNP, dv_GNP = (torch.empty_like(t) for t in (q_GRNP, k_GNP, v_GNP))
        for rows in (slice(*b) for b in ctx.bounds):
            q, k, v = _expanded(q_GRNP[:, :, rows], k_GNP[:, rows], v_GNP[:, rows])
            given = (grad_GRNP[:, :, rows], q, k, v, out_GRNP[:, :, rows], lse_GRN[:, :, rows])
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, 0.0, True, scale=scale
            )
            dq_GRNP[:, :, rows], dk_GNP[:, rows], dv_GNP[:, rows] = dq, dk.sum(1), dv.sum(1)
        mean_GRN = _dot(grad_GRNP, out_GRNP) if chain else None
        return dq_GRNP, dk_GNP, dv_GNP, None, *_chain_grads(grad_GRNP, mean_GRN, q_GRNP, lse_GRN, chain, dq_GRNP)


class _Chain(torch.autograd.Function):
    """Merges own keys into an attention over other keys, given by its output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q_GRNP: Tensor, prefix_GRNP: Tensor, prefix_lse_GRN: Tensor, *chain: Tensor) -> Tensor:
        out_GRNP = prefix_GRNP.clone()
        lse_GRN = _merge(q_GRNP, out_GRNP, prefix_lse_GRN, chain)
        ctx.save_for_backward(q_GRNP, prefix_GRNP, prefix_lse_GRN, out_GRNP, lse_GRN, *chain)
        return out_GRNP

    @staticmethod
    def backward(ctx: Any, grad_GRNP: Tensor) -> tuple[Tensor, ...]:
        q_GRNP, prefix_GRNP, prefix_lse_GRN, out_GRNP, lse_GRN, *chain = ctx.saved_tensors
        dq_GRNP, mean_GRN = torch.zeros_like(q_GRNP), _dot(grad_GRNP, out_GRNP)
        dchain = _chain_grads(grad_GRNP, mean_GRN, q_GRNP, lse_GRN, chain, dq_GRNP)
        share_GRN = (prefix_lse_GRN - lse_GRN).exp()
        dlse_GRN = share_GRN * (_dot(grad_GRNP, prefix_GRNP) - mean_GRN)
        return dq_GRNP, grad_GRNP * share_GRN[..., None].to(grad_GRNP.dtype), dlse_GRN, *dchain


def _pairs(keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Key and value of each step but the first, one after the other."""
    return [tensor for pair in zip(keys[1:], values[1:], strict=True) for tensor in pair]


def _merge(q_GRNP: Tensor, out_GRNP: Tensor, lse_GRN: Tensor, chain: Sequence[Tensor]) -> Tensor:
    """Merge the chain's own keys into the output, where it is; the log-sum-exp of all keys."""
    own_KGRN = torch.stack([_own_scores(q_GRNP, key_GNP) for key_GNP in chain[::2]])
    all_lse_GRN = torch.logaddexp(lse_GRN, own_KGRN.logsumexp(0))
    out_GRNP *= (lse_GRN - all_lse_GRN).exp_()[..., None]
    for own_GRN, value_GNP in zip(own_KGRN, chain[1::2], strict=True):
        _add_own(out_GRNP, own_GRN, all_lse_GRN, value_GNP)
    return all_lse_GRN


def _chain_grads(
    grad_GRNP: Tensor,
    mean_GRN: Tensor,  # of the values that a row attends to, along its gradient
    q_GRNP: Tensor,
    lse_GRN: Tensor,
    chain: Sequence[Tensor],
    dq_GRNP: Tensor,
) -> list[Tensor]:
    """Gradients of the chain's keys and values; the query's is added to ``dq_GRNP``."""
    pairs = zip(chain[::2], chain[1::2], strict=True)
    return [g for pair in pairs for g in _own_grads(grad_GRNP, mean_GRN, q_GRNP, lse_GRN, *pair, dq_GRNP)]


@fusable
def _own_scores(q_GRNP: Tensor, key_GNP: Tensor) -> Tensor:
    return _dot(q_GRNP, key_GNP[:, None]) * q_GRNP.shape[-1] ** -0.5


@fusable
def _add_own(out_GRNP: Tensor, own_GRN: Tensor, lse_GRN: Tensor, value_GNP: Tensor) -> None:
    out_GRNP.addcmul_((own_GRN - lse_GRN).exp()[..., None].to(out_GRNP.dtype), value_GNP[:, None])


@fusable
def _own_grads(
    grad_GRNP: Tensor,
    mean_GRN: Tensor,
    q_GRNP: Tensor,
    lse_GRN: Tensor,
    key_GNP: Tensor,
    value_GNP: Tensor,
    dq_GRNP: Tensor,
) -> tuple[Tensor, Tensor]:
    prob_GRN = (_own_scores(q_GRNP, key_GNP) - lse_GRN).exp()
    gain_GRN = _dot(grad_GRNP, value_GNP[:, None]) - mean_GRN
    dscore_GRN1 = (prob_GRN * gain_GRN * q_GRNP.shape[-1] ** -0.5)[..., None].to(q_GRNP.dtype)
    dq_GRNP.addcmul_(dscore_GRN1, key_GNP[:, None])
    prob_GRN1 = prob_GRN[..., None].to(q_GRNP.dtype)
    return (dscore_GRN1 * q_GRNP).sum(1), (prob_GRN1 * grad_GRNP).sum(1)


def _expanded(q_GRTP: Tensor, k_GTP: Tensor, v_GTP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as [batch, head, row, size]: a key head is a batch, so nothing is copied for its queries."""
    return q_GRTP, k_GTP[:, None].expand(q_GRTP.shape), v_GTP[:, None].expand(q_GRTP.shape)


def _dot(a_GRNP: Tensor, b_GRNP: Tensor) -> Tensor:
    return (a_GRNP * b_GRNP).sum(-1, dtype=wide(a_GRNP.dtype))
