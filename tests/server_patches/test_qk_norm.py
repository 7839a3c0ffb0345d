"""A draft's norms of queries and keys, which SGLang's model lacks, in its attention."""

from types import SimpleNamespace

import torch
from torch import nn

from server_patches.common.qk_norm import add_norms
from trainer.layers import RMSNorm

P, EPS = 8, 1e-5


class Rotary(nn.Module):
    """Hands back what it is given."""

    def forward(self, positions, query, key):
        return query, key


def layer():
    attention = nn.Module()
    attention.head_dim, attention.rotary_emb = P, Rotary()
    return SimpleNamespace(self_attn=attention)


def test_each_head_is_normed_before_it_is_turned_as_the_trainer_norms_it():
    given = layer()
    add_norms(None, given, SimpleNamespace(qk_norm=True, rms_norm_eps=EPS), 0)
    weights = dict(given.self_attn.named_parameters())
    assert weights.keys() == {"q_norm.weight", "k_norm.weight"}  # as a checkpoint's tensors are called
    heads = {"q_norm": torch.randn(3, 4 * P), "k_norm": torch.randn(3, 2 * P)}
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.rand(P))
        turned = given.self_attn.rotary_emb(torch.arange(3), *heads.values())
    for (name, x), found in zip(heads.items(), turned, strict=True):
        norm = RMSNorm(P, EPS)
        norm.load_state_dict({"weight": weights[f"{name}.weight"]})
        torch.testing.assert_close(found, norm(x.unflatten(-1, (-1, P))).flatten(1), check_layout=True)


def test_a_draft_without_them_stays_as_it_is():
    given = layer()
    before = given.self_attn.rotary_emb
    add_norms(None, given, SimpleNamespace(rms_norm_eps=EPS), 0)
    assert given.self_attn.rotary_emb is before
    assert not list(given.self_attn.parameters())
