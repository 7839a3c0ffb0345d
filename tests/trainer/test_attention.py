"""Packed attention against a softmax written out for each row, with gradients, in float64."""

import pytest
import torch

from trainer import attention

Q, P = 2, 4
BOUNDS = [(0, 5), (5, 6), (6, 13)]
N = 13


def written_out(q, keys, values):
    rows = []
    for start, end in BOUNDS:
        for t in range(start, end):
            own = [k[:, t : t + 1] for k in keys[1:]]
            seen_k = torch.cat([keys[0][:, start : t + 1], *own], 1)
            seen_v = torch.cat([values[0][:, start : t + 1], *(v[:, t : t + 1] for v in values[1:])], 1)
            probs = (torch.einsum("qp,qsp->qs", q[:, t], seen_k) * P**-0.5).softmax(-1)
            rows.append(torch.einsum("qs,qsp->qp", probs, seen_v))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_output_and_gradients(monkeypatch, flash, steps):
    monkeypatch.setattr(attention, "_has_flash", lambda q: flash)
    torch.manual_seed(steps)
    tensors = [torch.randn(Q, N, P, dtype=torch.float64, requires_grad=True) for _ in range(1 + 2 * steps)]
    q, keys, values = tensors[0], tensors[1 : 1 + steps], tensors[1 + steps :]
    found, wanted = attention.attend(q, keys, values, BOUNDS), written_out(q, keys, values)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(wanted)
    grads = torch.autograd.grad((found * weights).sum(), tensors)
    for g, w in zip(grads, torch.autograd.grad((wanted * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
