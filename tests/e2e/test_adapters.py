"""LoRA adapters: what they compute is not the target's and is not captured; acceptance is counted all the same."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.conftest import TARGET, TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled
from tests.e2e.test_layouts import NO_CACHE

RANK = 4


@pytest.fixture
def adapter(tmp_path):
    """Random, of the attention's inputs, and large enough that it answers otherwise than the target."""
    config, g = json.loads((TARGET / "config.json").read_text()), torch.Generator().manual_seed(0)
    head = config["head_dim"]
    widths = {
        "q_proj": head * config["num_attention_heads"],
        "k_proj": head * config["num_key_value_heads"],
        "v_proj": head * config["num_key_value_heads"],
    }
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, config["hidden_size"], generator=g)
            weights[f"{module}.lora_B.weight"] = torch.randn(width, RANK, generator=g)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": [*widths], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(TARGET)}))
    return tmp_path


def kept(status):
    return status["tokens"]["captured"] - status["tokens"]["dropped"].get("past_finish", 0)


def test_beside_requests_of_an_adapter_the_targets_own_are_captured(start, adapter, reference):
    expected = reference()[:12]
    lora = ("--enable-lora", "--lora-paths", f"mine={adapter}", "--lora-backend", "torch_native")
    client = start("--dtype", "float32", NO_CACHE, *lora, training=TRAINING)
    texts, before = prompts(12), settled(client)  # SGLang's own request at start may be among what is captured
    mixed = [*texts, *texts]
    sampling = {"temperature": 0, "max_new_tokens": 48}
    body = {"text": mixed, "lora_path": [None] * 12 + ["mine"] * 12, "sampling_params": sampling}
    answers = client.post("/generate", json=body).raise_for_status().json()
    plain, adapted = answers[:12], answers[12:]
    assert outputs(plain) == expected
    assert outputs(adapted) != expected
    status = settled(client)
    (export,) = status["export"]
    assert export["failure"] is None
    assert export["requests"]["left_out"]["adapter"] == 12
    assert export["requests"]["captured"] - before["export"][0]["requests"]["captured"] == 12
    computed = sum(a["meta_info"]["prompt_tokens"] + a["meta_info"]["completion_tokens"] - 1 for a in plain)
    assert kept(status) - kept(before) == computed
    assert status["acceptance_by_slice"]["adapter:mine"]["passes"] > 0
    assert_every_token_is_accounted_for(status)
