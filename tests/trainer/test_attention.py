"""Packed attention against a softmax written out for each row, with gradients, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from trainer.attention import attend_by_flash, attend_by_flex

G, R, P = 2, 3, 16
BOUNDS = [(0, 5), (5, 6), (6, 13)]
N = 13


def written_out(q, keys, values):
    rows = []
    for start, end in BOUNDS:
        for t in range(start, end):
            seen_k = torch.cat([keys[0][:, start : t + 1], *(k[:, t : t + 1] for k in keys[1:])], 1)
            seen_v = torch.cat([values[0][:, start : t + 1], *(v[:, t : t + 1] for v in values[1:])], 1)
            probs = (torch.einsum("grp,gsp->grs", q[:, :, t], seen_k) * P**-0.5).softmax(-1)
            rows.append(torch.einsum("grs,gsp->grp", probs, seen_v))
    return torch.stack(rows, 2)


def plain_flex(q, k, v, block_mask, enable_gqa, return_aux):
    """``flex_attention`` in plain matrices: PyTorch's has no backward on a CPU."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    rows = torch.arange(q.shape[2])
    seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), rows[:, None], rows[None])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))


def by_plain_flex(q, keys, values, bounds):
    return attend_by_flex(q, keys, values, bounds, flex=plain_flex)


@pytest.mark.parametrize("attend", [attend_by_flash, by_plain_flex])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_output_and_gradients(attend, steps):
    torch.manual_seed(steps)
    q = torch.randn(G, R, N, P, dtype=torch.float64, requires_grad=True)
    chain = [torch.randn(G, N, P, dtype=torch.float64, requires_grad=True) for _ in range(2 * steps)]
    keys, values = chain[:steps], chain[steps:]
    found, wanted = attend(q, keys, values, BOUNDS), written_out(q, keys, values)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(wanted)
    grads = torch.autograd.grad((found * weights).sum(), [q, *chain])
    for g, w in zip(grads, torch.autograd.grad((wanted * weights).sum(), [q, *chain]), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_flex_attention_gives_the_numbers_of_flash(steps):
    torch.manual_seed(steps)
    q = torch.randn(G, R, N, P)
    keys, values = ([torch.randn(G, N, P) for _ in range(steps)] for _ in range(2))
    found = attend_by_flex(q, keys, values, BOUNDS, flex=flex_attention)
    torch.testing.assert_close(found, attend_by_flash(q, keys, values, BOUNDS), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_compiled_flex_attention_on_a_gpu_gives_the_numbers_and_gradients_of_flash():
    torch.manual_seed(0)
    given = [torch.randn(G, R, N, P), *(torch.randn(G, N, P) for _ in range(8))]
    grads = []
    for attend, device in ((attend_by_flash, "cpu"), (attend_by_flex, "cuda")):
        q, *chain = (t.to(device).requires_grad_() for t in given)
        out = attend(q, chain[:4], chain[4:], BOUNDS)
        grads.append([out, *torch.autograd.grad(out.square().sum(), [q, *chain])])
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(w.cpu(), g, atol=1e-3, rtol=1e-3)
