"""Draft trees: building them from the draft's choices and walking them with the target's.

Shapes: B requests, N nodes a tree (root included), D draft steps. The loops below run over the depth and
the width of a tree, never over requests or tokens. Layouts and parameter names (``retrive_*`` included, which
SGLang passes by keyword) are those of ``sgl_kernel.speculative``.
"""

import torch

QLEN_ONLY = 1  # sglang.srt.speculative.eagle_utils.TreeMaskMode.QLEN_ONLY


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Fill, in place, what verification needs to know of each tree.

    ``parent_list`` [B, topk*(D-1)+1] (no columns for one step, where all hang from the root) and
    ``selected_index`` [B, N-1] come from the draft; ``tree_mask`` (B*N*N bools) becomes true where a node sees an
    ancestor or itself, ``positions`` (B*N) the absolute position of each node, and the three ``retrieve_*`` [B, N] the
    tree as pointers: node in the flat batch, first child, next sibling (-1 where there is none).
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise NotImplementedError(
            f"sgl_kernel.build_tree_kernel_efficient_cpu: tree_mask_mode {int(tree_mask_mode)} is not covered; "
            f"the portable kernels build QLEN_ONLY ({QLEN_ONLY}) masks"
        )
    B, N = verified_seq_len.numel(), draft_token_num
    node_N = torch.arange(N)

    parent_BN = torch.zeros(B, N, dtype=torch.long)
    if N > 1 and depth > 1:
        group_BM = selected_index // topk  # which expanded node a choice hangs from; 0 is the root
        token_BM = parent_list.gather(1, group_BM)
        chosen_at_BM = (selected_index[:, None, :] == token_BM[:, :, None]).int().argmax(-1)
        parent_BN[:, 1:] = torch.where(group_BM > 0, chosen_at_BM + 1, 0)

    mask_BNN = torch.zeros(B, N, N, dtype=torch.bool)
    ancestor_BN = node_N.expand(B, N)
    for _ in range(depth + 1):
        mask_BNN.scatter_(2, ancestor_BN[:, :, None], True)
        ancestor_BN = parent_BN.gather(1, ancestor_BN)
    mask_BNN[:, :, 0] = True
    tree_mask.view(B, N, N).copy_(mask_BNN)
    positions.view(B, N).copy_(verified_seq_len[:, None] + mask_BNN.sum(-1) - 1)

    is_child_BNN = (parent_BN[:, None, :] == node_N[:, None]) & (node_N > 0)
    same_parent_BNN = parent_BN[:, :, None] == parent_BN[:, None, :]
    later_NN = (node_N[None, :] > node_N[:, None]) & (node_N[:, None] > 0)
    retrieve_index.copy_(torch.arange(B * N).view(B, N))
    retrieve_next_token.copy_(_first_true(is_child_BNN))
    retrieve_next_sibling.copy_(_first_true(same_parent_BNN & later_NN))


def _first_true(flags: torch.Tensor) -> torch.Tensor:
    """Index of the first true along the last dimension, -1 where there is none."""
    return torch.where(flags.any(-1), flags.int().argmax(-1), -1)


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follow, from each root, the child whose token is the target's choice, and write what was accepted.

    ``candidates`` and ``target_predict`` are [B, N]; ``accept_index`` [B, D+1] receives the accepted nodes
    in the flat batch (root first, the rest left as they are), ``accept_token_num`` [B] the number of
    accepted drafts, ``predicts`` (B*N) the target's token at each node on the path (the last is the bonus).
    """
    B, N = candidates.shape
    row_B = torch.arange(B)
    target_BN = target_predict.view(B, N)
    node_B = torch.zeros(B, dtype=torch.long)
    alive_B = torch.ones(B, dtype=torch.bool)
    accepted_B = torch.zeros(B, dtype=torch.long)
    accept_index[:, 0] = retrive_index[:, 0].to(accept_index.dtype)
    for step in range(1, accept_index.shape[1]):
        wanted_B = target_BN[row_B, node_B]
        child_B = torch.where(alive_B, retrive_next_token[row_B, node_B].long(), -1)
        while True:
            matched_B = (child_B >= 0) & (candidates[row_B, child_B] == wanted_B)
            looking_B = (child_B >= 0) & ~matched_B
            if not looking_B.any():
                break
            child_B = torch.where(looking_B, retrive_next_sibling[row_B, child_B].long(), child_B)
        alive_B = matched_B
        if not alive_B.any():
            break
        predicts[retrive_index[row_B, node_B][alive_B].long()] = wanted_B[alive_B].to(predicts.dtype)
        node_B = torch.where(alive_B, child_B, node_B)
        accepted_B += alive_B
        accept_index[alive_B, step] = retrive_index[row_B, node_B][alive_B].to(accept_index.dtype)
    accept_token_num.copy_(accepted_B)
    predicts[retrive_index[row_B, node_B].long()] = target_BN[row_B, node_B].to(predicts.dtype)
