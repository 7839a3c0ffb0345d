"""Each portable kernel once more, one request and one token at a time: what the vectorised ones must equal."""

import torch


def build_tree(parent_list, selected_index, seq_lens, topk, nodes):
    """Mask [B, N, N], positions [B, N], first child [B, N], next sibling [B, N]."""
    B, N = seq_lens.numel(), nodes
    mask = torch.zeros(B, N, N, dtype=torch.bool)
    positions = torch.zeros(B, N, dtype=torch.long)
    child, sibling = torch.full((B, N), -1), torch.full((B, N), -1)
    for b in range(B):
        selected, parents = selected_index[b].tolist(), parent_list[b].tolist()
        parent = [-1]
        for choice in selected:
            group = choice // topk
            parent.append(0 if group == 0 else selected.index(parents[group]) + 1)
        for node in range(N):
            at, depth = node, 0
            while at >= 0:
                mask[b, node, at] = True
                at, depth = parent[at], depth + 1
            positions[b, node] = int(seq_lens[b]) + depth - 1
            children = [c for c in range(1, N) if parent[c] == node]
            if children:
                child[b, node] = children[0]
            for left, right in zip(children, children[1:], strict=False):
                sibling[b, left] = right
    return mask, positions, child, sibling


def verify_greedy(candidates, child, sibling, target, depth):
    """Accepted nodes [B][<= depth + 1] and the target's token at each of them."""
    accepted, predicted = [], []
    for b in range(candidates.shape[0]):
        path = [0]
        while len(path) <= depth:
            wanted, at = int(target[b, path[-1]]), int(child[b, path[-1]])
            while at >= 0 and int(candidates[b, at]) != wanted:
                at = int(sibling[b, at])
            if at < 0:
                break
            path.append(at)
        accepted.append(path)
        predicted.append([int(target[b, node]) for node in path])
    return accepted, predicted


def attend_one(q_HD, keys_SGD, values_SGD, seen_S, scaling, logit_cap, sinks_H):
    """One query over one sequence, head by head, in float64."""
    H, _ = q_HD.shape
    group = H // keys_SGD.shape[1]
    out = torch.zeros(H, values_SGD.shape[-1], dtype=torch.float64)
    for h in range(H):
        scores = keys_SGD[seen_S, h // group].double() @ q_HD[h].double() * scaling
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H[h].double().view(1)])
        probs = scores.softmax(0)[: int(seen_S.sum())]
        out[h] = probs @ values_SGD[seen_S, h // group].double()
    return out
