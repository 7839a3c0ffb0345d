"""Packed attention against a softmax written out for each row, with gradients, in float64."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.trainer.plain_flex import plain_flex
from trainer import attention
from trainer.attention import attend_by_flash, attend_by_flex
from trainer.roots import Roots, Run

G, R, P, N = 2, 3, 16, 13
CPU = torch.device("cpu")
ROOTS = {
    "all rows": Roots.everywhere([(0, 5), (5, 6), (6, 13)], CPU),
    "the ends of two samples": Roots([Run(0, 3, 5), Run(6, 8, 13)], N, CPU),
    "turns of one sample": Roots([Run(0, 0, 2), Run(0, 4, 5), Run(0, 9, 12)], N, CPU),
}


def of_roots(roots, steps, dtype=torch.float32):
    """Random queries, and keys and then values of each step."""
    L = roots.row_L.numel()
    chain = [torch.randn(G, L if i % steps else N, P, dtype=dtype) for i in range(2 * steps)]
    return torch.randn(G, R, L, P, dtype=dtype), *chain


def written_out(q, keys, values, roots):
    outputs = []
    for first, start, end in roots.runs:
        for row in range(start, end):
            at = len(outputs)
            seen_k = torch.cat([keys[0][:, first : row + 1], *(k[:, at : at + 1] for k in keys[1:])], 1)
            seen_v = torch.cat([values[0][:, first : row + 1], *(v[:, at : at + 1] for v in values[1:])], 1)
            probs = (torch.einsum("grp,gsp->grs", q[:, :, at], seen_k) * P**-0.5).softmax(-1)
            outputs.append(torch.einsum("grs,gsp->grp", probs, seen_v))
    return torch.stack(outputs, 2)


def by_plain_flex(q, keys, values, roots):
    return attend_by_flex(q, keys, values, roots, flex=plain_flex)


@pytest.mark.parametrize("attend", [attend_by_flash, by_plain_flex])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
@pytest.mark.parametrize("which", ROOTS)
def test_output_and_gradients(attend, steps, which):
    torch.manual_seed(steps)
    roots = ROOTS[which]
    q, *chain = (t.requires_grad_() for t in of_roots(roots, steps, torch.float64))
    given = (q, chain[:steps], chain[steps:], roots)
    found, wanted = attend(*given), written_out(*given)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(wanted)
    grads = torch.autograd.grad((found * weights).sum(), [q, *chain])
    for g, w in zip(grads, torch.autograd.grad((wanted * weights).sum(), [q, *chain]), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [40, 300])  # the gradient of short runs goes another way
def test_bfloat16_is_rounded_and_no_more(rows):
    torch.manual_seed(rows)
    roots = Roots([Run(0, 0, rows), Run(rows, rows + 20, 2 * rows)], 2 * rows, CPU)
    q, *chain = (torch.randn(n, 2 * rows if i in (1, 3) else roots.count, P) for i, n in enumerate((G * R, G, G, G, G)))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q_QLP, *pairs = (t.bfloat16().to(dtype).requires_grad_() for t in (q, *chain))
        out = attend_by_flash(q_QLP.unflatten(0, (G, R)), pairs[:2], pairs[2:], roots)
        found.append([out, *torch.autograd.grad(out.square().sum(), [q_QLP, *pairs])])
    for low, wanted in zip(*found, strict=True):
        assert (low - wanted).norm() < 0.02 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("which", ROOTS)
def test_flex_attention_gives_the_numbers_of_flash(steps, which):
    torch.manual_seed(steps)
    q, *chain = of_roots(ROOTS[which], steps)
    given = (q, chain[:steps], chain[steps:], ROOTS[which])
    found = attend_by_flex(*given, flex=flex_attention)
    torch.testing.assert_close(found, attend_by_flash(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 128, 500, 1500])
def test_blocks_of_keys_are_those_that_their_roots_attend_to(rows):
    torch.manual_seed(rows)
    bounds = sorted({0, rows, *torch.randint(rows, (5,)).tolist()})
    runs = [Run(a, (a + b) // 2, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    roots = Roots(runs, rows, CPU)
    mask, N = attention._prefix_of(roots), torch.arange(rows)
    wanted = mask.mask_mod(None, None, torch.arange(roots.count)[:, None], N)
    found = torch.zeros_like(wanted)
    listed = (mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True)
    for counts, places, whole in listed:
        for block, (count, keys) in enumerate(zip(counts[0, 0].tolist(), places[0, 0].tolist(), strict=True)):
            for key in keys[:count]:
                at = slice(128 * block, 128 * block + 128), slice(128 * key, 128 * key + 128)
                assert wanted[at].all() or not whole
                assert not found[at].any()
                found[at] |= wanted[at]
    assert torch.equal(found, wanted)
    assert int(mask.full_kv_num_blocks.sum()) > 0 or rows < 1000


@pytest.mark.gpu
@pytest.mark.parametrize("which", ROOTS)
def test_compiled_flex_attention_on_a_gpu_gives_the_numbers_and_gradients_of_flash(which):
    torch.manual_seed(0)
    given, grads = of_roots(ROOTS[which], 4), []
    for attend, device in ((attend_by_flash, "cpu"), (attend_by_flex, "cuda")):
        q, *chain = (t.to(device).detach().requires_grad_() for t in given)
        out = attend(q, chain[:4], chain[4:], Roots([*ROOTS[which].runs], N, torch.device(device)))
        grads.append([out, *torch.autograd.grad(out.square().sum(), [q, *chain])])
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(w.cpu(), g, atol=1e-3, rtol=1e-3)
