"""Extend and decode attention over SGLang's paged KV cache.

Shapes: B requests, E new tokens (longest), S keys (longest), H query heads, G key heads, D head size,
T new tokens of the whole batch. Signatures follow ``torch.ops.sgl_kernel.{extend,decode}_attention_cpu``
as ``IntelAMXAttnBackend`` calls them. ``sliding_window`` counts the token itself; 0 means none.
"""

import torch
import torch.nn.functional as F


def extend_attention_cpu(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor | None,
    v_TGD: torch.Tensor | None,
    out_THD: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    max_len_extend: int,
    scaling: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    is_causal: bool = True,
) -> None:
    """New tokens attend to their whole sequence, whose keys are already in the cache; fills ``out_THD``.

    ``tree_mask`` (B*E*E bools, every request extending by E) replaces causality among the new tokens. Of multi-head
    latent attention, whose cache holds no head's keys, prompts without a prefix come with keys and values of their own;
    anything else comes absorbed, as one key head.
    """
    _refuse_cross_attention("extend_attention_cpu", is_cross_attention)
    B, (least, E) = extend_seq_lens.numel(), map(int, extend_seq_lens.aminmax())
    of_heads = k_TGD is not None and k_TGD.shape[1:].numel() != k_buffer.shape[1:].numel()
    if least == E == 1 and not of_heads:  # a verification that nothing was drafted for
        unused = seq_lens
        decode_attention_cpu(
            q_THD, k_buffer, v_buffer, k_scale, v_scale, out_THD, None, None, unused, unused, req_to_token,
            req_pool_indices, seq_lens, scaling, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks,
        )  # fmt: skip
        return
    S = int(seq_lens.max())
    if q_THD.shape[0] > (T := int(extend_seq_lens.sum())):  # filled up to another rank's batch, under DP attention
        out_THD[T:] = 0
        q_THD, out_THD, req_pool_indices = q_THD[:T], out_THD[:T], req_pool_indices[:B]
    seq_B11, new_B11 = seq_lens.long().view(B, 1, 1), extend_seq_lens.long().view(B, 1, 1)
    prefix_B11 = seq_B11 - new_B11
    row_BE = torch.arange(E).expand(B, E)
    valid_BE = row_BE < new_B11.view(B, 1)
    flat_BE = torch.where(valid_BE, extend_start_loc.long()[:, None] + row_BE, 0)

    slot_S = torch.arange(S).view(1, 1, S)
    query_slot_BE1 = prefix_B11 + row_BE[:, :, None]
    key_position_BXS, query_position_BE1 = slot_S, query_slot_BE1
    mask_BES = slot_S < seq_B11
    if tree_mask is not None:
        seen_BEE = tree_mask.view(B, E, E)
        depth_BE = seen_BEE.sum(-1) - 1
        node_B1S = (slot_S - prefix_B11).clamp(0, E - 1)
        in_tree_B1S = slot_S >= prefix_B11
        mask_BES = mask_BES & (~in_tree_B1S | seen_BEE.gather(2, node_B1S.expand(B, E, S)))
        query_position_BE1 = prefix_B11 + depth_BE[:, :, None]
        key_position_BXS = torch.where(in_tree_B1S, prefix_B11 + depth_BE.gather(1, node_B1S[:, 0])[:, None], slot_S)
    elif is_causal:
        mask_BES = mask_BES & (slot_S <= query_slot_BE1)
    if sliding_window > 0:
        mask_BES = mask_BES & (query_position_BE1 - key_position_BXS < sliding_window)

    if of_heads:
        if prefix_B11.any():
            raise NotImplementedError(
                "sgl_kernel.extend_attention_cpu: a prefix of latents beside keys of heads is not covered by the "
                "portable kernels; start the server with --disable-chunked-prefix-cache"
            )
        k_BSGD, v_BSGD = k_TGD[flat_BE], v_TGD[flat_BE]
    else:
        k_BSGD, v_BSGD = _gather_kv(
            k_buffer, v_buffer, k_scale, v_scale, req_to_token, req_pool_indices, S, seq_lens, q_THD.dtype
        )
    out_BEHD = _attend(q_THD[flat_BE], k_BSGD, v_BSGD, mask_BES.expand(B, E, S), scaling, logit_cap, sinks)
    out_THD[flat_BE[valid_BE]] = out_BEHD[valid_BE].to(out_THD.dtype)


def decode_attention_cpu(
    q_BHD: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    out_BHD: torch.Tensor,
    k_BGD: torch.Tensor | None,
    v_BGD: torch.Tensor | None,
    loc: torch.Tensor,
    attn_logits: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> None:
    """One new token a request: store its key and value (when given), attend, fill ``out_BHD``."""
    _refuse_cross_attention("decode_attention_cpu", is_cross_attention)
    if k_BGD is not None:
        k_buffer[loc] = k_BGD.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = v_BGD.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    B, S = seq_lens.numel(), int(seq_lens.max())
    if q_BHD.shape[0] > B:  # filled up, as above
        out_BHD[B:] = 0
        q_BHD, out_BHD, req_pool_indices = q_BHD[:B], out_BHD[:B], req_pool_indices[:B]
    seq_B1, slot_S = seq_lens.long().view(B, 1), torch.arange(S)
    mask_BS = slot_S < seq_B1
    if sliding_window > 0:
        mask_BS = mask_BS & (seq_B1 - 1 - slot_S < sliding_window)
    k_BSGD, v_BSGD = _gather_kv(
        k_buffer, v_buffer, k_scale, v_scale, req_to_token, req_pool_indices, S, seq_lens, q_BHD.dtype
    )
    out_B1HD = _attend(q_BHD[:, None], k_BSGD, v_BSGD, mask_BS[:, None], scaling, logit_cap, sinks)
    out_BHD.copy_(out_B1HD[:, 0])


def _refuse_cross_attention(operator: str, is_cross_attention: bool) -> None:
    if is_cross_attention:
        raise NotImplementedError(f"sgl_kernel.{operator}: cross attention is not covered by the portable kernels")


def _gather_kv(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    S: int,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, S, G, D] of each request; past its length, the padding slot 0."""
    slots_BS = req_to_token[:, :S].index_select(0, req_pool_indices)
    slots_N = torch.where(torch.arange(S) < seq_lens.view(-1, 1), slots_BS, 0).flatten()
    # Whole rows at once: indexing by a tensor of two dimensions takes three times as long.
    k_BSGD, v_BSGD = (x.index_select(0, slots_N).view(-1, S, *x.shape[1:]).to(dtype) for x in (k_buffer, v_buffer))
    return (k_BSGD * k_scale if k_scale != 1.0 else k_BSGD), (v_BSGD * v_scale if v_scale != 1.0 else v_BSGD)


def _attend(
    q_BEHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    mask_BES: torch.Tensor,
    scaling: float,
    logit_cap: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Grouped-query attention under a mask; rows that see nothing (padding) come back undefined."""
    q_BHED, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BEHD, k_BSGD, v_BSGD))
    if logit_cap <= 0 and sinks_H is None:
        out_BHED = F.scaled_dot_product_attention(
            q_BHED, k_BGSD, v_BGSD, attn_mask=mask_BES[:, None], scale=scaling, enable_gqa=True
        )
        return out_BHED.transpose(1, 2)

    groups = q_BHED.shape[1] // k_BGSD.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(groups, 1).float() for x in (k_BGSD, v_BGSD))
    scores_BHES = q_BHED.float() @ k_BHSD.transpose(2, 3) * scaling
    if logit_cap > 0:
        scores_BHES = logit_cap * torch.tanh(scores_BHES / logit_cap)
    scores_BHES = scores_BHES.masked_fill(~mask_BES[:, None], float("-inf"))
    if sinks_H is not None:
        # A sink is one more logit a head that takes probability and gives no value (gpt-oss).
        B, H, E, _ = scores_BHES.shape
        sink_BHE1 = sinks_H.float().view(1, H, 1, 1).expand(B, H, E, 1)
        probs_BHES = torch.cat([scores_BHES, sink_BHE1], -1).softmax(-1)[..., :-1]
    else:
        probs_BHES = scores_BHES.softmax(-1)
    return (probs_BHES @ v_BHSD).transpose(1, 2)
