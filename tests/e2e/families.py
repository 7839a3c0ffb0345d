"""Tiny random targets of each family, made by transformers: 8 layers, 64 wide, the tiny target's tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Llama4ImageProcessor,
    Llama4Processor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

Fields = Mapping[str, Any]
_TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_target"
_COMMON = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "moe_layer_freq": 1, **_EXPERTS,
}  # fmt: skip
_DEEPSEEK = {
    **_LATENT, "topk_method": "greedy", "scoring_func": "softmax",
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip
_DEEPSEEK_V3 = {**_DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_QWEN_MARKS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_GEMMA3_MARKS = {
    "image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}  # fmt: skip
_GEMMA4_MARKS = {
    "image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
    "audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_id": "<audio|>",
    "video_token_id": "<|video|>",
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64}
_QWEN_VISION = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_SIGLIP = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@dataclass(frozen=True)
class Family:
    """``text`` differs from ``_COMMON``; ``vision`` is the configuration of what reads images, where anything does."""

    model_type: str
    text: Fields = field(default_factory=dict)
    vision: Fields | None = None
    marks: Fields = field(default_factory=dict)  # tokens around images, by the names of their ids in the configuration
    more: Fields = field(default_factory=dict)  # of the configuration that holds both
    flags: tuple[str, ...] = ("--dtype", "float32")  # of the server
    called: str | None = None  # its ``model_type`` where transformers knows it by another, or not at all

    @property
    def tied(self) -> bool:
        return self.text.get("tie_word_embeddings", False)


FAMILIES = {
    "llama": Family("llama", {"head_dim": 16}),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", {"head_dim": 16}),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 16, "num_experts": 4, **_EXPERTS}),
    "deepseek_v2": Family("deepseek_v2", _DEEPSEEK),
    "deepseek_v3": Family("deepseek_v3", _DEEPSEEK_V3),
    "kimi_k2": Family("deepseek_v3", _DEEPSEEK_V3, called="kimi_k2"),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": Family(
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
        flags=("--dtype", "float32", "--moe-runner-backend", "triton"),  # its default loads no bf16 experts on a CPU
    ),
    "gemma3": Family("gemma3_text", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": Family("phi3"),
    "glm4_moe_lite": Family("glm4_moe_lite", {**_LATENT, "q_lora_rank": 32}),
    "glm4_moe": Family(
        "glm4_moe",
        {
            "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1, **_EXPERTS,
        },
    ),
    "llama4": Family(
        "llama4",
        {
            "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
            "attention_chunk_size": 256,
        },
        {
            **_SIGLIP, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        {
            "image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>",
            "placeholder_token_index": "<|image|>",
        },
        flags=("--dtype", "bfloat16"),  # SGLang computes its attention in nothing else
    ),
    "gemma3_images": Family(
        "gemma3",
        {"head_dim": 16, "tie_word_embeddings": True},
        {**_SIGLIP, "vision_use_head": False},
        _GEMMA3_MARKS,
        more={"mm_tokens_per_image": 4},
        flags=("--dtype", "float32", "--enable-multimodal"),
    ),
    "gemma4": Family(
        "gemma4",
        {
            "head_dim": 16, "global_head_dim": 16, "tie_word_embeddings": True, "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0,
        },
        {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
        _GEMMA4_MARKS,
    ),
    "apertus": Family("apertus"),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        {**_QWEN_VISION, "fullatt_block_indexes": [1]},
        _QWEN_MARKS,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        _QWEN_MARKS,
    ),
}  # fmt: skip


def _load_tokenizer(**more: Any) -> Any:
    return AutoTokenizer.from_pretrained(_TOKENIZER, pad_token="<unk>", **more)


def _qwen_processor(kind: Any, of_videos: Any, patch: int, tokenizer: Any) -> Any:
    smallest, largest = (2 * patch) ** 2, (12 * patch) ** 2  # two patches are merged each way
    images = Qwen2VLImageProcessor(patch_size=patch, min_pixels=smallest, max_pixels=largest)
    return kind(images, tokenizer, of_videos(patch_size=patch), chat_template=tokenizer.chat_template)


def _llama4_processor(tokenizer: Any) -> Any:
    images = Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=2)
    return Llama4Processor(images, tokenizer, patch_size=14, chat_template=tokenizer.chat_template)


def _gemma3_processor(tokenizer: Any) -> Any:
    marks = {name.removesuffix("_index"): token for name, token in _GEMMA3_MARKS.items()}
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    tokenizer = _load_tokenizer(extra_special_tokens=marks)
    return Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)


def _gemma4_processor(tokenizer: Any) -> Any:
    marks = {name.removesuffix("_id"): token for name, token in _GEMMA4_MARKS.items()}
    tokenizer = _load_tokenizer(extra_special_tokens=marks)
    reads = (Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(), tokenizer, Gemma4VideoProcessor())
    return Gemma4Processor(*reads, chat_template=tokenizer.chat_template)


# SGLang starts without one of the others.
_PROCESSORS = {
    "gemma3": _gemma3_processor,
    "gemma4": _gemma4_processor,
    "llama4": _llama4_processor,
    "qwen2_5_vl": partial(_qwen_processor, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, 14),
    "qwen3_vl": partial(_qwen_processor, Qwen3VLProcessor, Qwen3VLVideoProcessor, 16),
}


def make_target(family: str, folder: Path) -> Path:
    """A model of the family in ``folder``: without a tokenizer, unless it reads images."""
    torch.manual_seed(0)
    made = FAMILIES[family]
    text = {**_COMMON, **made.text}
    if made.vision is None:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(made.model_type, **text)).float().save_pretrained(folder)
        if made.called:
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": made.called}))
        return folder
    tokenizer = _load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(made.marks.values())})
    text["vocab_size"] = len(tokenizer)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in made.marks.items()}
    parts = {"text_config": text, "vision_config": made.vision}
    config = AutoConfig.for_model(made.model_type, **parts, tie_word_embeddings=made.tied, **ids, **made.more)
    # SGLang looks into the index of several files for Llama 4's vision tower, and serves it as one of text without.
    most = "1MB" if family == "llama4" else "1GB"
    model = AutoModelForImageTextToText.from_config(config).float()
    if family == "gemma3_images":  # else nothing of an image is seen
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.save_pretrained(folder, max_shard_size=most)
    if family == "gemma3_images":
        _name_as_published(folder / "model.safetensors")
    if make_processor := _PROCESSORS.get(made.model_type):
        make_processor(tokenizer).save_pretrained(folder)
    return folder


def _name_as_published(file: Path) -> None:
    """As Gemma 3 has its vision tower on Hugging Face and SGLang reads it; newer versions of transformers do not."""
    tensors = load_file(file)
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


if __name__ == "__main__":
    import sys

    make_target(sys.argv[1], Path(sys.argv[2]))
