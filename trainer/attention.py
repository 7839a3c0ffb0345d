"""Attention of the training-time test over packed samples; no mask over rows and steps is ever built.

Root t of step k attends to the true prefix of its sample (step-0 keys up to t) and to its own key of each later
step (EAGLE-3, section 3.2): the prefix part is causal attention over the pack, and the few own keys are merged into it
by their log-sum-exp. On a CPU the prefix part is PyTorch's FlashAttention, a run of roots at a time: once over the rows
before the run and once, causal, over the run itself. Its backward needs only the final output and log-sum-exp of a row
and so serves the merged softmax as it is. Elsewhere it is flex_attention, compiled, over all roots at once. Shapes: N
rows of the pack, L roots among them, T roots of a run, G key heads, R query heads to a key head, P head size.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from trainer.fused import fusable, wide
from trainer.roots import Roots, repeated

_BLOCK = 128  # rows of a block of flex_attention's masks
_FEW_ROWS = 256  # of so few in bfloat16, PyTorch's gradient on a CPU takes two to four times as long as in float32


def attend(q_QLP: Tensor, keys: list[Tensor], values: list[Tensor], roots: Roots) -> Tensor:
    """Attention output of the roots [Q, L, P]. Keys and values of step 0 are of all rows [G, N, P], later [G, L, P]."""
    q_GRLP = q_QLP.unflatten(0, (keys[0].shape[0], -1))
    attend_merged = attend_by_flash if q_QLP.device.type == "cpu" else attend_by_flex
    return attend_merged(q_GRLP, keys, values, roots).flatten(0, 1)


def attend_by_flash(q_GRLP: Tensor, keys: list[Tensor], values: list[Tensor], roots: Roots) -> Tensor:
    return _PrefixAndChain.apply(q_GRLP, keys[0], values[0], roots, *_pairs(keys, values))


def attend_by_flex(q_GRLP: Tensor, keys: list[Tensor], values: list[Tensor], roots: Roots, flex: Any = None) -> Tensor:
    """``flex`` stands in for the compiled ``flex_attention``."""
    G, R, L, P = q_GRLP.shape
    given = (q_GRLP.reshape(1, G * R, L, P), keys[0][None], values[0][None])
    out, aux = (flex or _compiled_flex())(
        *given, block_mask=_prefix_of(roots), enable_gqa=R > 1, return_aux=AuxRequest(lse=True)
    )
    out_GRLP, lse_GRL = out[0].view(q_GRLP.shape), aux.lse[0].view(G, R, L)
    if len(keys) == 1:
        return out_GRLP
    return _Chain.apply(q_GRLP, out_GRLP, lse_GRL, *_pairs(keys, values))


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=4)
def _prefix_of(roots: Roots) -> BlockMask:
    """The rows of its sample up to a root, for each root.

    Which blocks of keys a block of roots attends to, in part or whole, follows from its first and its last root, since
    rows and samples ascend; ``create_block_mask`` would make a mask [L, N] on the way.
    """
    row_L = roots.row_L
    firsts, lengths = zip(*((first, end - start) for first, start, end in roots.runs), strict=True)
    first_L = repeated(firsts, lengths, roots.device)

    def attends(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first_L[query] <= key) & (key <= row_L[query])

    start_B1 = torch.arange(0, roots.count, _BLOCK, device=roots.device)[:, None]
    last_B1 = (start_B1 + _BLOCK).clamp(max=roots.count) - 1
    key_S = torch.arange(0, roots.rows, _BLOCK, device=roots.device)  # first of each block
    seen_BS = (key_S + _BLOCK > first_L[start_B1]) & (key_S <= row_L[last_B1])
    whole_BS = (key_S >= first_L[last_B1]) & (key_S + _BLOCK - 1 <= row_L[start_B1])
    return BlockMask.from_kv_blocks(
        *_listed(seen_BS & ~whole_BS),
        *_listed(whole_BS),
        BLOCK_SIZE=_BLOCK,
        mask_mod=attends,
        seq_lengths=(roots.count, roots.rows),
    )


def _listed(is_in_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For one batch and head of a ``BlockMask``: how many of each row, and their places, before all others."""
    places_BS = is_in_BS.argsort(dim=-1, descending=True, stable=True)
    return is_in_BS.sum(-1, dtype=torch.int32)[None, None], places_BS.int()[None, None]


class _PrefixAndChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GRLP: Tensor, k_GNP: Tensor, v_GNP: Tensor, roots: Roots, *chain: Tensor) -> Tensor:
        out_GRLP = torch.empty_like(q_GRLP)
        lse_GRL = q_GRLP.new_empty(q_GRLP.shape[:3], dtype=wide(q_GRLP.dtype))
        for at, parts in _runs(roots):
            found = (_flash(q_GRLP[:, :, at], k_GNP[:, rows], v_GNP[:, rows], causal) for rows, causal in parts)
            out_GRLP[:, :, at], lse_GRL[:, :, at] = reduce(_over_both, found)
        if chain:
            lse_GRL = _merge(q_GRLP, out_GRLP, lse_GRL, chain)
        ctx.roots = roots
        ctx.save_for_backward(q_GRLP, k_GNP, v_GNP, out_GRLP, lse_GRL, *chain)
        return out_GRLP

    @staticmethod
    def backward(ctx: Any, grad_GRLP: Tensor) -> tuple[Tensor | None, ...]:
        q_GRLP, k_GNP, v_GNP, out_GRLP, lse_GRL, *chain = ctx.saved_tensors
        dq_GRLP, dk_GNP, dv_GNP = torch.empty_like(q_GRLP), torch.zeros_like(k_GNP), torch.zeros_like(v_GNP)
        for at, parts in _runs(ctx.roots):
            given = [t[:, :, at] for t in (grad_GRLP, q_GRLP, out_GRLP, lse_GRL)]
            for rows, causal in parts:
                dq, dk, dv = _flash_grads(*given, k_GNP[:, rows], v_GNP[:, rows], causal)
                if causal:  # no part before has touched these
                    dq_GRLP[:, :, at], dk_GNP[:, rows], dv_GNP[:, rows] = dq, dk, dv
                else:
                    dq_GRLP[:, :, at] += dq
                    dk_GNP[:, rows] += dk
                    dv_GNP[:, rows] += dv
        mean_GRL = _dot(grad_GRLP, out_GRLP) if chain else None
        return dq_GRLP, dk_GNP, dv_GNP, None, *_chain_grads(grad_GRLP, mean_GRL, q_GRLP, lse_GRL, chain, dq_GRLP)


def _runs(roots: Roots) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Each run's places among the roots; and the rows that it attends to: its own, causally, and those before it."""
    place = 0
    for first, start, end in roots.runs:
        before = [(slice(first, start), False)] if first < start else []
        yield slice(place, place + end - start), [(slice(start, end), True), *before]
        place += end - start


def _flash(q_GRTP: Tensor, k_GSP: Tensor, v_GSP: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp [G, R, T], over S keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_GRTP, *_for_queries(q_GRTP, k_GSP, v_GSP), 0.0, causal, scale=q_GRTP.shape[-1] ** -0.5
    )


def _flash_grads(
    grad_GRTP: Tensor, q_GRTP: Tensor, out_GRTP: Tensor, lse_GRT: Tensor, k_GSP: Tensor, v_GSP: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of what these keys gave to an output over them and others."""
    if q_GRTP.shape[2] <= _FEW_ROWS:
        inputs = (grad_GRTP, q_GRTP, out_GRTP, k_GSP, v_GSP)
        grad_GRTP, q_GRTP, out_GRTP, k_GSP, v_GSP = (t.to(wide(t.dtype)) for t in inputs)
    given = (grad_GRTP, q_GRTP, *_for_queries(q_GRTP, k_GSP, v_GSP), out_GRTP, lse_GRT)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, 0.0, causal, scale=q_GRTP.shape[-1] ** -0.5
    )
    return dq, dk.sum(1), dv.sum(1)


def _for_queries(q_GRTP: Tensor, *tensors_GSP: Tensor) -> Iterator[Tensor]:
    """As [batch, head, row, size]: a key head is a batch, so nothing is copied for its queries."""
    return (t[:, None].expand(-1, q_GRTP.shape[1], -1, -1) for t in tensors_GSP)


def _over_both(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys, from those over some and over the others."""
    lse_GRT = torch.logaddexp(some[1], others[1])
    shares = ((part_GRT - lse_GRT).exp()[..., None].to(some[0].dtype) for _, part_GRT in (some, others))
    return sum(out_GRTP * share for (out_GRTP, _), share in zip((some, others), shares, strict=True)), lse_GRT


class _Chain(torch.autograd.Function):
    """Merges own keys into an attention over other keys, given by its output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q_GRLP: Tensor, prefix_GRLP: Tensor, prefix_lse_GRL: Tensor, *chain: Tensor) -> Tensor:
        out_GRLP = prefix_GRLP.clone()
        lse_GRL = _merge(q_GRLP, out_GRLP, prefix_lse_GRL, chain)
        ctx.save_for_backward(q_GRLP, prefix_GRLP, prefix_lse_GRL, out_GRLP, lse_GRL, *chain)
        return out_GRLP

    @staticmethod
    def backward(ctx: Any, grad_GRLP: Tensor) -> tuple[Tensor, ...]:
        q_GRLP, prefix_GRLP, prefix_lse_GRL, out_GRLP, lse_GRL, *chain = ctx.saved_tensors
        dq_GRLP, mean_GRL = torch.zeros_like(q_GRLP), _dot(grad_GRLP, out_GRLP)
        dchain = _chain_grads(grad_GRLP, mean_GRL, q_GRLP, lse_GRL, chain, dq_GRLP)
        share_GRL = (prefix_lse_GRL - lse_GRL).exp()
        dlse_GRL = share_GRL * (_dot(grad_GRLP, prefix_GRLP) - mean_GRL)
        return dq_GRLP, grad_GRLP * share_GRL[..., None].to(grad_GRLP.dtype), dlse_GRL, *dchain


def _pairs(keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Key and value of each step but the first, one after the other."""
    return [tensor for pair in zip(keys[1:], values[1:], strict=True) for tensor in pair]


def _merge(q_GRLP: Tensor, out_GRLP: Tensor, lse_GRL: Tensor, chain: Sequence[Tensor]) -> Tensor:
    """Merge the chain's own keys into the output, where it is; the log-sum-exp of all keys."""
    own_KGRL = torch.stack([_own_scores(q_GRLP, key_GLP) for key_GLP in chain[::2]])
    all_lse_GRL = torch.logaddexp(lse_GRL, own_KGRL.logsumexp(0))
    out_GRLP *= (lse_GRL - all_lse_GRL).exp_()[..., None]
    for own_GRL, value_GLP in zip(own_KGRL, chain[1::2], strict=True):
        _add_own(out_GRLP, own_GRL, all_lse_GRL, value_GLP)
    return all_lse_GRL


def _chain_grads(
    grad_GRLP: Tensor,
    mean_GRL: Tensor,  # of the values that a row attends to, along its gradient
    q_GRLP: Tensor,
    lse_GRL: Tensor,
    chain: Sequence[Tensor],
    dq_GRLP: Tensor,
) -> list[Tensor]:
    """Gradients of the chain's keys and values; the query's is added to ``dq_GRLP``."""
    pairs = zip(chain[::2], chain[1::2], strict=True)
    return [g for pair in pairs for g in _own_grads(grad_GRLP, mean_GRL, q_GRLP, lse_GRL, *pair, dq_GRLP)]


@fusable
def _own_scores(q_GRLP: Tensor, key_GLP: Tensor) -> Tensor:
    return _dot(q_GRLP, key_GLP[:, None]) * q_GRLP.shape[-1] ** -0.5


@fusable
def _add_own(out_GRLP: Tensor, own_GRL: Tensor, lse_GRL: Tensor, value_GLP: Tensor) -> None:
    out_GRLP.addcmul_((own_GRL - lse_GRL).exp()[..., None].to(out_GRLP.dtype), value_GLP[:, None])


@fusable
def _own_grads(
    grad_GRLP: Tensor,
    mean_GRL: Tensor,
    q_GRLP: Tensor,
    lse_GRL: Tensor,
    key_GLP: Tensor,
    value_GLP: Tensor,
    dq_GRLP: Tensor,
) -> tuple[Tensor, Tensor]:
    prob_GRL = (_own_scores(q_GRLP, key_GLP) - lse_GRL).exp()
    gain_GRL = _dot(grad_GRLP, value_GLP[:, None]) - mean_GRL
    dscore_GRL1 = (prob_GRL * gain_GRL * q_GRLP.shape[-1] ** -0.5)[..., None].to(q_GRLP.dtype)
    dq_GRLP.addcmul_(dscore_GRL1, key_GLP[:, None])
    prob_GRL1 = prob_GRL[..., None].to(q_GRLP.dtype)
    return (dscore_GRL1 * q_GRLP).sum(1), (prob_GRL1 * grad_GRLP).sum(1)


def _dot(a_GRLP: Tensor, b_GRLP: Tensor) -> Tensor:
    return (a_GRLP * b_GRLP).sum(-1, dtype=wide(a_GRLP.dtype))
