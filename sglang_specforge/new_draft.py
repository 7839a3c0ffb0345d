"""Random drafts for a target, that a run can start from."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from sglang_specforge.checkpoint import FINGERPRINT_KEY, load_config, save_checkpoint
from sglang_specforge.drafts import EAGLE3_VARIANTS, expected_shapes
from sglang_specforge.settings import SettingsError
from sglang_specforge.target import fingerprint_target, load_embedding_and_head, load_target_config, resolve_target
from sglang_specforge.training_settings import TrainingSettings

Recipe = Literal["eagle3", "eagle3.1", "eagle3-qk-norm"]
RECIPES: dict[Recipe, dict[str, Any]] = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "eagle3-qk-norm": {"qk_norm": True},
}
ROTARY = ("default", "dynamic", "linear", "llama3", "yarn")  # kinds that are computed alike by server and trainer
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
_LATENT_KEY_HEADS, _LATENT_HEAD_DIM = 8, 128  # of drafts for targets with latent attention
COPIED = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def init_draft(
    target_path: str,
    out: Path,
    *,
    draft_vocab_size: int = 32_000,
    dtype: str = "auto",
    seed: int = 0,
    variant: Mapping[str, Any] = MappingProxyType({}),
    counts_V: torch.Tensor | None = None,
) -> Path:
    """Write a draft with random weights for the target to ``out``.

    A draft vocabulary smaller than the target's takes the tokens with the highest ``counts_V`` (int64 [V]), or else
    the lowest ids, which BPE merges first. ``lm_head`` starts as the target's rows of these ids, as it reads a hidden
    state of the same width. ``variant`` holds keys of config.json that differ from a plain EAGLE3 draft's.
    """
    folder = resolve_target(target_path)
    target = load_target_config(folder)
    _, head_VH = load_embedding_and_head(folder)
    if dtype == "auto":
        dtype = name_of(head_VH.dtype)
    config = draft_config(target, draft_vocab_size, dtype, fingerprint_target(folder)) | variant
    V, D = config["vocab_size"], config["draft_vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name in ("d2t", "t2d", "lm_head.weight"):
            continue
        values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        tensors[name] = values.to(getattr(torch, dtype))
    ids_D = choose_vocabulary(V, D, counts_V)
    tensors["lm_head.weight"] = head_VH[ids_D].to(getattr(torch, dtype))
    tensors["d2t"] = ids_D - torch.arange(D)
    tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids_D, True)
    save_checkpoint(out, config, tensors)
    return out


def choose_vocabulary(V: int, D: int, counts_V: torch.Tensor | None = None) -> torch.Tensor:
    """Target ids of the draft vocabulary, ascending int64 [D]: the most frequent, of equals the lowest."""
    if counts_V is None:
        return torch.arange(D)
    return counts_V.sort(descending=True, stable=True).indices[:D].sort().values


def coverage(counts_V: torch.Tensor, D: int) -> str:
    """How much of what was counted a draft vocabulary of ``D`` tokens holds, in words."""
    total, held = int(counts_V.sum()), int(counts_V.sort(descending=True).values[:D].sum())
    share = f"{100 * held / total:.2f}%" if total else "nothing"
    return (
        f"draft vocabulary: {min(D, counts_V.numel())} of {counts_V.numel()} tokens hold {share} of {total:,} counted"
    )


def check_made_with(draft: Path, settings: TrainingSettings) -> None:
    """Of a draft that an earlier life of the run folder made: that it is what is asked for now, where anything is.

    Raises:
        SettingsError: it has another vocabulary, or is of another recipe.
    """
    config, differs = load_config(draft), []
    asked = {name: getattr(settings, name) for name in settings.model_fields_set & {"draft_vocab_size", "recipe"}}
    if (size := asked.get("draft_vocab_size")) and min(size, config["vocab_size"]) != config["draft_vocab_size"]:
        differs.append(f"draft_vocab_size {size}, where it has {config['draft_vocab_size']}")
    variants = {name: config[name] for name in EAGLE3_VARIANTS if config.get(name)}
    if (recipe := asked.get("recipe")) and variants != RECIPES[recipe]:
        differs.append(f"recipe {recipe!r}, where it has {', '.join(variants) or 'no variant'}")
    if differs:
        raise SettingsError(
            f"the draft of run folder {settings.run_dir} was made otherwise than is asked for: {'; '.join(differs)}. "
            "Leave that out, or give another run folder"
        )


def draft_config(target: PretrainedConfig, draft_vocab_size: int, dtype: str, fingerprint: str) -> dict[str, Any]:
    """``config.json`` of a one-layer Llama draft with the target's widths, heads and rotary settings."""
    heads, key_heads, head_dim = _heads(target)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
        "rope_parameters": _rope_parameters(target),
        "tie_word_embeddings": False,
        "dtype": dtype,
        FINGERPRINT_KEY: fingerprint,
        **{name: getattr(target, name, None) for name in COPIED},
    }


def _heads(target: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads and their size: the target's.

    Latent attention (MLA) has a key for each query, none of which it keeps. A draft does keep its own, so it gets eight
    key heads at most.
    """
    H, heads = target.hidden_size, target.num_attention_heads
    if not getattr(target, "kv_lora_rank", None):
        key_heads = getattr(target, "num_key_value_heads", None) or heads
        return heads, key_heads, getattr(target, "head_dim", None) or H // heads
    head_dim = _LATENT_HEAD_DIM if H % _LATENT_HEAD_DIM == 0 else H // heads
    return H // head_dim, math.gcd(H // head_dim, _LATENT_KEY_HEADS), head_dim


def _rope_parameters(target: PretrainedConfig) -> dict[str, Any]:
    """The target's, or those of its layers with full attention where they have others than the rest.

    A draft turns the whole of a head, by one position a token: of a target that turns a part, or in a way that is not
    known here, it has the base alone; of one that reads images nothing of their rows and columns, which for text are
    that one position.
    """
    found = target.rope_parameters
    found = found.get("full_attention", found)
    if found["rope_type"] not in ROTARY or found.get("partial_rotary_factor", 1.0) != 1.0:
        return {"rope_type": "default", "rope_theta": found["rope_theta"]}
    return {name: value for name, value in found.items() if name not in _OF_IMAGES}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
