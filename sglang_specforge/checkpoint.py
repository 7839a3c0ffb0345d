"""EAGLE3 draft checkpoints as SGLang loads them (``LlamaForCausalLMEagle3``): layout, creation and checks.

A checkpoint is a folder with ``config.json`` and ``model.safetensors``. Shapes: H hidden, V target vocabulary,
D draft vocabulary, Q and K query and key/value widths, I intermediate. ``d2t`` [D] holds, for each draft id,
the target id minus the draft id; ``t2d`` [V] says which target ids the draft knows.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from sglang_specforge.target import fingerprint_target, load_embedding_and_head, load_target_config, resolve_target

FINGERPRINT_KEY = "specforge_target_fingerprint"
_COPIED = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


class CheckpointError(ValueError):
    """A draft checkpoint cannot be used; the message names the tensor or fingerprint at fault."""


def draft_config(target: PretrainedConfig, draft_vocab_size: int, dtype: str, fingerprint: str) -> dict[str, Any]:
    """``config.json`` of a one-layer Llama draft with the target's widths, heads and rotary settings."""
    heads = target.num_attention_heads
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(target, "num_key_value_heads", None) or heads,
        "head_dim": getattr(target, "head_dim", None) or target.hidden_size // heads,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
        "rope_parameters": dict(target.rope_parameters),
        "tie_word_embeddings": False,
        "dtype": dtype,
        FINGERPRINT_KEY: fingerprint,
        **{name: getattr(target, name, None) for name in _COPIED},
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape."""
    H, V, D, I = (config[k] for k in ("hidden_size", "vocab_size", "draft_vocab_size", "intermediate_size"))  # noqa: E741
    Q, K = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    return {
        "fc.weight": (H, 3 * H),
        "midlayer.self_attn.q_proj.weight": (Q, 2 * H),
        "midlayer.self_attn.k_proj.weight": (K, 2 * H),
        "midlayer.self_attn.v_proj.weight": (K, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, Q),
        "midlayer.mlp.gate_proj.weight": (I, H),
        "midlayer.mlp.up_proj.weight": (I, H),
        "midlayer.mlp.down_proj.weight": (H, I),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
        "norm.weight": (H,),
        "lm_head.weight": (D, H),
        "d2t": (D,),
        "t2d": (V,),
    }


def init_draft(
    target_path: str, out: Path, *, draft_vocab_size: int = 32_000, dtype: str = "auto", seed: int = 0
) -> Path:
    """Write a draft with random weights for the target to ``out``.

    A draft vocabulary smaller than the target's takes its lowest ids, which BPE merges first. ``lm_head`` starts
    as the target's rows of these ids, as it reads a hidden state of the same width.
    """
    folder = resolve_target(target_path)
    target = load_target_config(folder)
    _, head_VH = load_embedding_and_head(folder)
    if dtype == "auto":
        dtype = str(head_VH.dtype).removeprefix("torch.")
    config = draft_config(target, draft_vocab_size, dtype, fingerprint_target(folder))
    V, D = config["vocab_size"], config["draft_vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name in ("d2t", "t2d", "lm_head.weight"):
            continue
        values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        tensors[name] = values.to(getattr(torch, dtype))
    tensors["lm_head.weight"] = head_VH[:D].to(getattr(torch, dtype), copy=True)
    tensors["d2t"] = torch.zeros(D, dtype=torch.int64)
    tensors["t2d"] = torch.arange(V) < D
    save_checkpoint(out, config, tensors)
    return out


def save_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint; readers that find ``config.json`` find all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    save_config(folder, config)


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, all at once."""
    staged = folder / "config.json.part"
    staged.write_text(json.dumps(config, indent=2) + "\n")
    staged.replace(folder / "config.json")


def load_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint, as it is."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"draft checkpoint {folder}: config.json cannot be read: {error}") from error


def load_checked(folder: Path, served: dict[str, Any], fingerprint: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint that may take the place of the draft whose config is ``served``.

    Raises:
        CheckpointError: it was trained for another target, a tensor is missing, unknown, of another shape, or
            not finite, or ``d2t`` and ``t2d`` do not describe one draft vocabulary.
    """
    found = load_config(folder).get(FINGERPRINT_KEY)
    if found != fingerprint:
        raise CheckpointError(
            f"draft checkpoint {folder}: target fingerprint {found!r} is not that of the served target "
            f"{fingerprint!r}; train it on this target"
        )
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"draft checkpoint {folder}: model.safetensors cannot be read: {error}") from error
    shapes = expected_shapes(served)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        what = "is missing" if name in shapes else "is not part of an EAGLE3 draft"
        raise CheckpointError(f"draft checkpoint {folder}: tensor {name} {what}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"draft checkpoint {folder}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                f"the served draft {shape}"
            )
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise CheckpointError(f"draft checkpoint {folder}: tensor {name} has values that are not finite")
    known_D = tensors["d2t"] + torch.arange(shapes["d2t"][0])
    if not torch.equal(known_D, tensors["t2d"].nonzero().flatten()):
        raise CheckpointError(f"draft checkpoint {folder}: tensors d2t and t2d disagree about the draft vocabulary")
    return tensors
