"""Bookkeeping of KV-cache slots: who owns which, and moving what they hold.

``req_to_token`` is SGLang's [pool, context] table of slots. Ragged ranges are flattened once and moved with
one gather or scatter, in numpy, which on such small arrays takes a third of torch's time; signatures follow
``sgl_kernel.speculative`` and ``sgl_kernel.kvcacheio``.
"""

import ctypes

import numpy as np
import torch


def _flatten_ranges(start_B: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T] and columns [T] of the ranges ``start .. start + length`` laid end to end."""
    length_B = length_B.clip(0)
    row_T = np.arange(length_B.size).repeat(length_B)
    return row_T, np.arange(row_T.size) + (start_B - length_B.cumsum() + length_B)[row_T]


def _slots_of_ranges(
    req_pool_indices: torch.Tensor, start_offset: torch.Tensor, end_offset: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Where ``start .. end`` of each request lie in ``req_to_token``, end to end."""
    start_B = start_offset.numpy()
    row_T, col_T = _flatten_ranges(start_B, end_offset.numpy() - start_B)
    return req_pool_indices.numpy()[row_T], col_T


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write ``out_cache_loc`` [T] into ``req_to_token[req, start:end]`` of each request, end to end."""
    at_T = _slots_of_ranges(req_pool_indices, start_offset, end_offset)
    req_to_token.numpy()[at_T] = out_cache_loc.numpy()[: at_T[0].size]


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read ``req_to_token[req, start:end]`` of each request into ``out_cache_loc`` [T], end to end."""
    at_T = _slots_of_ranges(req_pool_indices, start_offset, end_offset)
    out_cache_loc.numpy()[: at_T[0].size] = req_to_token.numpy()[at_T]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Read the ``topk * steps`` slots that follow each request's sequence into ``out_cache_loc``."""
    slots = topk * speculative_num_steps
    col_BS = seq_lens.long()[:, None] + torch.arange(slots)
    locs_BS = req_to_token[req_pool_indices.long()[:, None], col_BS]
    out_cache_loc[: locs_BS.numel()] = locs_BS.flatten().to(out_cache_loc.dtype)


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, stride: int
) -> None:
    """Take the last accepted token of each request: ``accept_tokens`` holds ``stride`` of them a request."""
    last_B = torch.arange(accept_lens.numel()) * stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.view(-1)[last_B])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the slots of the accepted nodes (``accept_index`` >= 0) to the front of ``accept_out_cache_loc``."""
    locs = out_cache_loc[accept_index[accept_index != -1].long()]
    accept_out_cache_loc[: locs.numel()] = locs


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Shift each request's tokens left by one, in place, and put its new token last (or at ``select_index``)."""
    _, dst_T = _flatten_ranges(extend_start_loc.numpy(), extend_seq_lens.numpy() - 1)
    ids = input_ids.numpy()
    ids[dst_T] = ids[dst_T + 1]
    at_B = select_index if select_index is not None else extend_start_loc + extend_seq_lens - 1
    some_B = extend_seq_lens > 0
    input_ids[at_B[some_B].long()] = topk_index.view(-1)[some_B].to(input_ids.dtype)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Move KV rows ``src_loc`` to ``tgt_loc`` in every layer's buffer, given by address and row size in bytes."""
    if tgt_loc.numel() == 0:
        return
    tgt, src = tgt_loc.long(), src_loc.long()
    rows = int(torch.maximum(tgt.max(), src.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        layer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        layer[tgt] = layer[src]  # the gather is a copy, so overlapping moves are safe


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    speculative_num_steps: int,
    pool_len: int,
) -> torch.Tensor:
    """Slots seen by each of a request's ``topk`` candidates: the shared prefix, then its own drafted tokens.

    Returns [B*topk, pool_len]; past a candidate's tokens the row is zero.
    """
    B, steps = req_pool_indices.numel(), speculative_num_steps
    width = min(int(seq_lens.max()) + steps, pool_len) if B else 0
    seq_B11 = seq_lens.long().view(B, 1, 1)
    branch_1K1 = torch.arange(topk).view(1, topk, 1)
    col_W = torch.arange(width).view(1, 1, width)
    source_BKW = torch.where(col_W < seq_B11, col_W, col_W + branch_1K1 * steps).clamp(max=req_to_token.shape[1] - 1)
    slots_BKW = req_to_token[req_pool_indices.long().view(B, 1, 1), source_BKW]
    out = req_to_token.new_zeros(B * topk, pool_len)
    out[:, :width] = torch.where(col_W < seq_B11 + steps, slots_BKW, 0).view(B * topk, width)
    return out
