"""A draft is turned in the trainer as SGLang turns it, whatever its rotary settings."""

import pytest
import torch
from sglang.srt.layers.rotary_embedding import base, get_rope
from transformers import LlamaConfig

from trainer.layers import rotate
from trainer.rotary import RotaryEmbedding

HEADS, P, LONGEST, POSITIONS = 2, 32, 512, 500
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 5, 3]}


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
        AXES,
        AXES | {"mrope_interleaved": True},
    ],
)  # fmt: skip
def test_the_trainer_turns_heads_as_the_server_does(monkeypatch, given):
    compare(monkeypatch, given, torch.arange(POSITIONS))


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_turns_them_by_time_height_and_width_as_the_server_does(monkeypatch, interleaved):
    positions_N3 = torch.randint(LONGEST, (POSITIONS, 3), generator=torch.Generator().manual_seed(0))
    compare(monkeypatch, AXES | {"mrope_interleaved": interleaved}, positions_N3)


def compare(monkeypatch, given, positions):
    monkeypatch.setattr(base, "_is_cpu", True)  # it would look for a GPU's kernel
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * P, num_attention_heads=HEADS, head_dim=P, max_position_embeddings=LONGEST,
        rope_parameters=dict(given),
    )  # fmt: skip
    served = get_rope(P, P, LONGEST, given["rope_theta"], True, dict(config.rope_parameters), torch.float32)
    x_NQP = torch.randn(POSITIONS, HEADS, P)
    wanted, _ = served.forward_native(positions.T, x_NQP.flatten(1).clone(), x_NQP.flatten(1).clone())
    cos_sin = RotaryEmbedding(config)(x_NQP, positions)
    torch.testing.assert_close(rotate(x_NQP.transpose(0, 1), *cos_sin).transpose(0, 1).flatten(1), wanted)
