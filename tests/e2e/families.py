"""Tiny random targets of each family, made by transformers: 8 layers, a vocabulary of 1024, 64 wide."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": True, "moe_layer_freq": 1,
    "scoring_func": "softmax", **_EXPERTS,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, **_EXPERTS},
    "deepseek_v2": {"model_type": "deepseek_v2", **_LATENT},
    "deepseek_v3": {"model_type": "deepseek_v3", **_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 64,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3"},
    "llama4": {
        "model_type": "llama4_text", "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
    },
}  # fmt: skip


def make_target(family: str, folder: Path) -> Path:
    """A model of the family in ``folder``, without a tokenizer."""
    torch.manual_seed(0)
    fields = {**_COMMON, **FAMILIES[family]}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import sys

    make_target(sys.argv[1], Path(sys.argv[2]))
