"""Experts on the portable path: the ranks' shares add up to what one rank computes, and what weights apply to."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.topk import StandardTopKOutput

from server_patches.cpu.hooks import _run_experts

T, H, W, E, K = 7, 8, 6, 4, 3


@pytest.fixture(autouse=True)
def plain_activation(monkeypatch):
    def silu_and_mul(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr("sglang.srt.layers.moe.fused_moe_native.SiluAndMul", lambda: silu_and_mul)


def layer(w13, w2):
    return SimpleNamespace(num_experts=E, w13_weight=w13, w2_weight=w2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("local", [1, 2])
def test_the_shares_of_all_ranks_add_up(seed, local):
    torch.manual_seed(seed)
    x, w13, w2 = torch.randn(T, H), torch.randn(E, 2 * W, H), torch.randn(E, H, W)
    weights, ids = torch.rand(T, E).topk(K)
    config = MoeRunnerConfig()
    whole = moe_forward_native(layer(w13, w2), x, StandardTopKOutput(weights, ids, None), config)

    shares = torch.zeros(T, H)
    for first in range(0, E, local):
        own = slice(first, first + local)
        mine = (ids >= own.start) & (ids < own.stop)
        topk = StandardTopKOutput(weights, torch.where(mine, ids - first, -1), None)
        shares += _run_experts(moe_forward_native, layer(w13[own], w2[own]), x, topk, config)
    torch.testing.assert_close(shares, whole)


def test_a_rank_without_a_chosen_expert_adds_nothing():
    topk = StandardTopKOutput(torch.rand(T, K), torch.full((T, K), -1), None)
    out = _run_experts(moe_forward_native, layer(None, None), torch.randn(T, H), topk, MoeRunnerConfig())
    assert out.eq(0).all()


def test_an_expert_reads_its_tokens_weighted_where_the_router_says_so():
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(T, H), torch.randn(E, 2 * W, H), torch.randn(E, H, W)
    weights, ids = torch.rand(T, E).topk(K)
    config = MoeRunnerConfig(apply_router_weight_on_input=True)
    out = _run_experts(moe_forward_native, layer(w13, w2), x, StandardTopKOutput(weights, ids, None), config)

    wanted = torch.zeros(T, H)
    for t in range(T):
        for weight, expert in zip(weights[t], ids[t], strict=True):
            gate, up = (w13[expert] @ (x[t] * weight)).chunk(2)
            wanted[t] += w2[expert] @ (torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(out, wanted)
