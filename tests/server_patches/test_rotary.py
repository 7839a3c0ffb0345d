"""A draft is turned in the trainer as SGLang turns it, whatever its rotary settings."""

import pytest
import torch
from sglang.srt.layers.rotary_embedding import base, get_rope
from transformers import LlamaConfig

from trainer.layers import rotate
from trainer.rotary import RotaryEmbedding

HEADS, P, LONGEST, POSITIONS = 2, 32, 512, 500
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "given",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0},
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        YARN,
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2},
        YARN | {"mscale": 0.7},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.0},
        YARN | {"attn_factor": 0.5},
    ],
)  # fmt: skip
def test_the_trainer_turns_heads_as_the_server_does(monkeypatch, given):
    monkeypatch.setattr(base, "_is_cpu", True)  # it would look for a GPU's kernel
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * P, num_attention_heads=HEADS, head_dim=P, max_position_embeddings=LONGEST,
        rope_parameters=dict(given),
    )  # fmt: skip
    served = get_rope(P, P, LONGEST, given["rope_theta"], True, dict(config.rope_parameters), torch.float32)
    x_NQP, position_N = torch.randn(POSITIONS, HEADS, P), torch.arange(POSITIONS)
    wanted, _ = served.forward_native(position_N, x_NQP.flatten(1).clone(), x_NQP.flatten(1).clone())
    cos_sin = RotaryEmbedding(config)(x_NQP, position_N)
    torch.testing.assert_close(rotate(x_NQP.transpose(0, 1), *cos_sin).transpose(0, 1).flatten(1), wanted)
