"""The portable kernels against naive references, on random inputs."""

import pytest
import torch

from server_patches.cpu import attention, cache_locs, install, tree
from tests.server_patches import naive_kernels as naive

SEEDS = range(8)


def random_drafts(B, topk, depth, N):
    """``parent_list`` and ``selected_index`` the way SGLang's draft makes them, for random scores."""
    parents, selected = [], []
    for _ in range(B):
        scores, parent_list, frontier = [], [-1], None
        for step in range(depth):
            if step == 0:
                step_scores = torch.rand(topk)
                scores.append(step_scores)
                frontier, ids = step_scores, torch.arange(topk)
                parent_list += ids.tolist()
            else:
                children = (frontier[:, None] * torch.rand(topk, topk)).flatten()
                scores.append(children)
                best = children.topk(topk).indices
                ids = best + topk * topk * (step - 1) + topk
                frontier = children[best]
                if step < depth - 1:
                    parent_list += ids.tolist()
        flat = torch.cat(scores)
        selected.append(flat.topk(N - 1).indices.sort().values)
        parents.append(torch.tensor(parent_list[: topk * (depth - 1) + 1] if depth > 1 else [], dtype=torch.long))
    return torch.stack(parents), torch.stack(selected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("topk", "depth", "N"), [(1, 3, 4), (4, 3, 10), (2, 5, 8), (1, 1, 2), (4, 1, 3)])
def test_tree_building_and_verification(seed, topk, depth, N):
    torch.manual_seed(seed)
    B = 5
    parent_list, selected = random_drafts(B, topk, depth, N)
    seq_lens = torch.randint(1, 50, (B,))
    mask, positions = torch.zeros(B * N * N, dtype=torch.bool), torch.zeros(B * N, dtype=torch.long)
    index, child, sibling = (torch.full((B, N), -1) for _ in range(3))
    tree.build_tree_kernel_efficient_cpu(
        parent_list, selected, seq_lens, mask, positions, index, child, sibling, topk, depth, N, tree.QLEN_ONLY
    )
    expected = naive.build_tree(parent_list, selected, seq_lens, topk, N)
    for found, wanted in zip((mask.view(B, N, N), positions.view(B, N), child, sibling), expected, strict=True):
        assert torch.equal(found, wanted)

    candidates, target = torch.randint(0, 3, (B, N)), torch.randint(0, 3, (B, N))
    predicts = torch.full((B * N,), -7, dtype=torch.int32)
    accept_index = torch.full((B, depth + 1), -1, dtype=torch.int32)
    accepted_num = torch.zeros(B, dtype=torch.int32)
    tree.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accept_index, accept_token_num=accepted_num, candidates=candidates,
        retrive_index=index, retrive_next_token=child, retrive_next_sibling=sibling, target_predict=target,
    )  # fmt: skip
    paths, tokens = naive.verify_greedy(candidates, child, sibling, target, depth)
    for b, (path, predicted) in enumerate(zip(paths, tokens, strict=True)):
        flat = [b * N + node for node in path]
        assert accept_index[b, : len(path)].tolist() == flat
        assert accept_index[b, len(path) :].eq(-1).all()
        assert accepted_num[b] == len(path) - 1
        assert predicts[flat].tolist() == predicted


def test_other_tree_masks_are_refused_by_name():
    empty = torch.zeros(1, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="tree_mask_mode 0"):
        tree.build_tree_kernel_efficient_cpu(empty, empty, empty, empty, empty, empty, empty, empty, 1, 1, 2, 0)


class Cache:
    """A random paged KV cache of B requests."""

    def __init__(self, B, G, D, dtype):
        self.seq_lens = torch.randint(1, 20, (B,))
        self.req_pool_indices = torch.randperm(B + 2)[:B]
        self.req_to_token = torch.randperm((B + 2) * 32).view(B + 2, 32).int()
        self.k, self.v = (torch.randn((B + 2) * 32, G, D, dtype=dtype) for _ in range(2))

    def of(self, b):
        slots = self.req_to_token[self.req_pool_indices[b], : self.seq_lens[b]].long()
        return self.k[slots], self.v[slots]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("logit_cap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_decode_attention(seed, logit_cap, window, with_sinks):
    torch.manual_seed(seed)
    B, H, G, D = 4, 6, 2, 8
    cache = Cache(B, G, D, torch.float32)
    loc = torch.stack([cache.req_to_token[cache.req_pool_indices[b], n - 1] for b, n in enumerate(cache.seq_lens)])
    q, k_new, v_new = torch.randn(B, H, D), torch.randn(B, G, D), torch.randn(B, G, D)
    sinks = torch.randn(H) if with_sinks else None
    out = torch.empty(B, H, D)
    attention.decode_attention_cpu(
        q, cache.k, cache.v, 1.0, 1.0, out, k_new, v_new, loc.long(), None, cache.req_to_token, cache.req_pool_indices,
        cache.seq_lens, D**-0.5, logit_cap, False, window, None, sinks,
    )  # fmt: skip
    for b in range(B):
        keys, values = cache.of(b)
        assert torch.equal(keys[-1], k_new[b])
        seen = torch.ones(len(keys), dtype=torch.bool)
        if window:
            seen[:-window] = False
        wanted = naive.attend_one(q[b], keys, values, seen, D**-0.5, logit_cap, sinks)
        torch.testing.assert_close(out[b].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "tree", "undrafted"])
@pytest.mark.parametrize(("logit_cap", "window"), [(0.0, 0), (5.0, 0), (0.0, 4)])
def test_extend_attention(seed, kind, logit_cap, window):
    torch.manual_seed(seed)
    B, H, G, D, N = 4, 6, 2, 8, 6
    cache = Cache(B, G, D, torch.float32)
    if kind == "tree":
        cache.seq_lens = cache.seq_lens.clamp(min=N)
        extend = torch.full((B,), N)
        seen_BNN = naive.build_tree(*random_drafts(B, 2, 4, N), cache.seq_lens, 2, N)[0]
    elif kind == "undrafted":  # a tree of its root alone
        extend, seen_BNN = torch.ones(B, dtype=torch.long), torch.ones(B, 1, 1, dtype=torch.bool)
    else:
        extend = torch.minimum(torch.randint(1, 8, (B,)), cache.seq_lens)
    start = extend.cumsum(0) - extend
    q, out = torch.randn(int(extend.sum()), H, D), torch.zeros(int(extend.sum()), H, D)
    attention.extend_attention_cpu(
        q, None, None, out, cache.k, cache.v, 1.0, 1.0, cache.req_to_token, cache.req_pool_indices, cache.seq_lens,
        extend, start, int(extend.max()), D**-0.5, logit_cap, False, window, None, None,
        seen_BNN.flatten() if kind in ("tree", "undrafted") else None, kind != "bidirectional",
    )  # fmt: skip
    for b in range(B):
        keys, values = cache.of(b)
        prefix, position = len(keys) - int(extend[b]), torch.arange(len(keys))
        if kind == "tree":
            position[prefix:] = prefix + seen_BNN[b].sum(-1) - 1
        for e in range(int(extend[b])):
            seen = torch.ones(len(keys), dtype=torch.bool)
            if kind == "causal":
                seen[prefix + e + 1 :] = False
            elif kind == "tree":
                seen[prefix:] = seen_BNN[b, e]
            if window:
                seen &= position[prefix + e] - position < window
            wanted = naive.attend_one(q[start[b] + e], keys, values, seen, D**-0.5, logit_cap, None)
            torch.testing.assert_close(out[start[b] + e].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_of_latent_attention_bring_keys_of_their_own(seed):
    torch.manual_seed(seed)
    B, H, D, V = 4, 6, 8, 5
    cache = Cache(B, 1, 12, torch.float32)
    cache.seq_lens[0] = 1
    start, T = cache.seq_lens.cumsum(0) - cache.seq_lens, int(cache.seq_lens.sum())
    q, k, v, out = torch.randn(T, H, D), torch.randn(T, H, D), torch.randn(T, H, V), torch.zeros(T, H, V)

    def extend(extended):
        attention.extend_attention_cpu(
            q, k, v, out, cache.k, cache.v, 1.0, 1.0, cache.req_to_token, cache.req_pool_indices, cache.seq_lens,
            extended, start, int(extended.max()), D**-0.5, 0.0, False, 0, None,
        )  # fmt: skip

    extend(cache.seq_lens)
    for b, length in enumerate(cache.seq_lens):
        own = slice(start[b], start[b] + length)
        for e in range(length):
            wanted = naive.attend_one(q[own][e], k[own], v[own], torch.arange(length) <= e, D**-0.5, 0.0, None)
            torch.testing.assert_close(out[own][e].double(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="a prefix of latents"):
        extend((cache.seq_lens - 1).clamp(min=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_absorbed_latent_attention_reads_values_narrower_than_keys(seed):
    torch.manual_seed(seed)
    B, H, D, V = 4, 6, 12, 8
    cache = Cache(B, 1, D, torch.float32)
    cache.v = cache.k[..., :V]
    q, k = torch.randn(B, H, D), torch.randn(B, 1, D)
    loc = torch.stack([cache.req_to_token[cache.req_pool_indices[b], n - 1] for b, n in enumerate(cache.seq_lens)])
    decoded, extended, ones = torch.empty(B, H, V), torch.empty(B, H, V), torch.ones(B, dtype=torch.long)
    attention.decode_attention_cpu(
        q, cache.k, cache.v, 1.0, 1.0, decoded, k, k[..., :V], loc.long(), None, cache.req_to_token,
        cache.req_pool_indices, cache.seq_lens, D**-0.5, 0.0, False, 0, None,
    )  # fmt: skip
    attention.extend_attention_cpu(
        q, k, k[..., :V], extended, cache.k, cache.v, 1.0, 1.0, cache.req_to_token, cache.req_pool_indices,
        cache.seq_lens, ones, torch.arange(B), 1, D**-0.5, 0.0, False, 0, None,
    )  # fmt: skip
    for b in range(B):
        keys, values = cache.of(b)
        wanted = naive.attend_one(q[b], keys, values, torch.ones(len(keys), dtype=torch.bool), D**-0.5, 0.0, None)
        torch.testing.assert_close(decoded[b].double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(extended[b].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 1), (3, 2)])
def test_rows_that_fill_a_batch_up_to_another_ranks_change_nothing(lengths):
    torch.manual_seed(0)
    B, H, G, D = 2, 6, 2, 8
    cache, extend = Cache(B, G, D, torch.float32), torch.tensor(lengths)
    cache.seq_lens = cache.seq_lens.clamp(min=3)
    T = int(extend.sum())
    q = torch.randn(T + 4, H, D)

    def attend(filled):
        indices = torch.cat([cache.req_pool_indices, torch.zeros(filled, dtype=torch.long)])
        extended, decoded = torch.full((T + filled, H, D), torch.nan), torch.full((B + filled, H, D), torch.nan)
        attention.extend_attention_cpu(
            q[: T + filled], None, None, extended, cache.k, cache.v, 1.0, 1.0, cache.req_to_token, indices,
            cache.seq_lens, extend, extend.cumsum(0) - extend, int(extend.max()), D**-0.5, 0.0, False, 0, None,
        )  # fmt: skip
        attention.decode_attention_cpu(
            q[: B + filled], cache.k, cache.v, 1.0, 1.0, decoded, None, None, None, None, cache.req_to_token, indices,
            cache.seq_lens, D**-0.5, 0.0, False, 0, None,
        )  # fmt: skip
        return extended, decoded

    for rows, found, wanted in zip((T, B), attend(filled=4), attend(filled=0), strict=True):
        assert torch.equal(found[:rows], wanted)
        assert found[rows:].eq(0).all()


@pytest.mark.parametrize("kernel", [attention.extend_attention_cpu, attention.decode_attention_cpu])
def test_cross_attention_is_refused_by_name(kernel):
    arguments = [None] * kernel.__code__.co_argcount
    arguments[kernel.__code__.co_varnames.index("is_cross_attention")] = True
    with pytest.raises(NotImplementedError, match=kernel.__name__):
        kernel(*arguments)


@pytest.mark.parametrize("seed", SEEDS)
def test_cache_location_operators(seed):
    torch.manual_seed(seed)
    B, pool = 5, 40
    table = torch.arange(7 * pool, dtype=torch.int32).view(7, pool)
    reqs = torch.randperm(7)[:B]
    start = torch.randint(0, 10, (B,))
    end = start + torch.randint(0, 9, (B,))
    ranges = [(int(r), int(s), int(e)) for r, s, e in zip(reqs, start, end, strict=True)]

    read = torch.full((int((end - start).sum()),), -1)
    cache_locs.assign_extend_cache_locs_cpu(reqs, table, start, end, read, pool)
    assert read.tolist() == [int(x) for r, s, e in ranges for x in table[r, s:e]]

    written, fresh = table.clone(), torch.randint(1000, 2000, (len(read),))
    cache_locs.assign_req_to_token_pool_cpu(reqs, written, start, end, fresh, pool)
    wanted, offset = table.clone(), 0
    for r, s, e in ranges:
        wanted[r, s:e] = fresh[offset : offset + e - s]
        offset += e - s
    assert torch.equal(written, wanted)

    draft = torch.full((B * 2 * 3,), -1)
    cache_locs.assign_draft_cache_locs_contiguous_cpu(reqs, table, start, draft, pool, 2, 3)
    assert draft.tolist() == [int(x) for r, s, _ in ranges for x in table[r, s : s + 6]]

    rows = cache_locs.build_draft_decode_metadata_cpu(table, reqs, end, 2, 3, pool)
    for b, (r, _, e) in enumerate(ranges):
        for branch in range(2):
            slots = [*table[r, :e].tolist(), *table[r, e + 3 * branch : e + 3 * branch + 3].tolist()]
            assert rows[2 * b + branch].tolist() == slots + [0] * (pool - len(slots))


@pytest.mark.parametrize("seed", SEEDS)
def test_token_and_slot_packing(seed):
    torch.manual_seed(seed)
    B, stride = 4, 5
    lens = torch.randint(1, stride + 1, (B,))
    tokens, bonus = torch.randint(0, 99, (B, stride)), torch.zeros(B, dtype=torch.int64)
    cache_locs.fill_bonus_tokens_cpu(tokens, lens, bonus, stride)
    assert bonus.tolist() == [int(tokens[b, n - 1]) for b, n in enumerate(lens)]

    accept_index = torch.full((B, stride), -1)
    for b, n in enumerate(lens):
        accept_index[b, :n] = b * stride + torch.randperm(stride)[:n].sort().values
    slots, packed = torch.randint(0, 999, (B * stride,)), torch.zeros(B * stride, dtype=torch.int64)
    cache_locs.fill_accept_out_cache_loc_cpu(accept_index, slots, packed)
    wanted = [int(slots[i]) for i in accept_index.flatten() if i >= 0]
    assert packed.tolist() == wanted + [0] * (B * stride - len(wanted))

    lens[0] = 0
    starts = lens.cumsum(0) - lens
    ids, new = torch.randint(0, 99, (int(lens.sum()),)), torch.randint(100, 199, (B,))
    wanted = [x for s, n, t in zip(starts, lens, new, strict=True) if n for x in [*ids[s + 1 : s + n].tolist(), int(t)]]
    cache_locs.rotate_input_ids_cpu(ids, starts, lens, new)
    assert ids.tolist() == wanted


@pytest.mark.parametrize("seed", SEEDS)
def test_kv_moves_survive_overlap(seed):
    torch.manual_seed(seed)
    layers = [torch.randn(20, 3, 4), torch.randn(20, 2, 8).bfloat16()]
    target, source = torch.randperm(20)[:6], torch.randperm(20)[:6]
    wanted = [layer.clone() for layer in layers]
    for before, after in zip(layers, wanted, strict=True):
        for t, s in zip(target, source, strict=True):
            after[t] = before[s].clone()
    pointers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    strides = torch.tensor([layer[0].numel() * layer.element_size() for layer in layers])
    cache_locs.copy_all_layer_kv_cache_cpu(pointers, strides, target, source)
    assert all(torch.equal(a, b) for a, b in zip(layers, wanted, strict=True))


def test_an_uncovered_operator_is_named():
    with pytest.raises(NotImplementedError, match="sgl_kernel.moe_align_block_size"):
        install._uncovered("moe_align_block_size")()


def test_a_gpu_or_a_real_sgl_kernel_is_never_replaced(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(install, "is_installed", lambda: False)
    monkeypatch.setattr(install, "_real_sgl_kernel_works", lambda: True)
    assert not install.needs_portable_kernels()
    monkeypatch.setattr(install, "_real_sgl_kernel_works", lambda: False)
    assert install.needs_portable_kernels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not install.needs_portable_kernels()
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not install.needs_portable_kernels()
