"""Drafts that a run can start from: random ones, and ones that come from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import LlamaConfig, PretrainedConfig

from sglang_specforge.checkpoint import (
    FINGERPRINT_KEY,
    CheckpointError,
    check_tensors,
    load_config,
    noted_content,
    read_tensors,
    save_checkpoint,
)
from sglang_specforge.drafts import EAGLE3, EAGLE3_VARIANTS, expected_shapes, kind_of
from sglang_specforge.settings import SettingsError
from sglang_specforge.target import fingerprint_target, load_embedding_and_head, load_target_config, resolve_target
from sglang_specforge.training_settings import TrainingSettings

_KEPT = ("eagle_config", *EAGLE3_VARIANTS)  # the captured layers, where they are not the default ones, and variants
_TRAINABLE: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "tie_word_embeddings": (False, None),
}
Recipe = Literal["eagle3", "eagle3.1"]
RECIPES: dict[Recipe, dict[str, Any]] = {"eagle3": {}, "eagle3.1": {"fc_norm": True, "norm_output": True}}
_OWN = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")
_ROTARY = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
_COPIED = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


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
        dtype = _name(head_VH.dtype)
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


def import_draft(given: Path, target_path: Path, out: Path) -> Path:
    """Write a draft from elsewhere to ``out``, in the layout and with the fingerprint that drafts have here.

    Of an EAGLE3 draft, the embedding is left out, as SGLang shares the target's, and ``t2d`` is made where it is
    missing. Any other kind has to come in the layout that it has here.

    Raises:
        CheckpointError: it cannot be read, it is of no known kind, it is an EAGLE3 draft of several layers, it was
            trained here for another target, or a tensor does not fit the target.
    """
    raw, fingerprint = load_config(given), fingerprint_target(target_path)
    if kind_of(raw) is not EAGLE3:
        tensors = _read_given(given)
        check_tensors(given, {FINGERPRINT_KEY: None, **raw}, tensors, fingerprint)
        save_checkpoint(out, raw, tensors)
        return out
    for name, accepted in _TRAINABLE.items():
        if raw.get(name) not in accepted:
            raise CheckpointError(
                f"draft checkpoint {given}: {name} {raw.get(name)!r} cannot be trained, only {accepted[0]!r}"
            )
    tensors = {
        name.replace("layers.0.", "midlayer.").removeprefix("model."): tensor
        for name, tensor in _read_given(given).items()
        if "embed_tokens" not in name
    }
    target = load_target_config(target_path)
    try:
        llama = LlamaConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "model_type")})
    except Exception as error:  # of rubbish, transformers raises anything
        raise CheckpointError(f"draft checkpoint {given}: config.json is no Llama draft's: {error}") from error
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    D = raw.get("draft_vocab_size") or target.vocab_size
    if type(D) is not int or not 0 < D <= target.vocab_size:
        raise CheckpointError(
            f"draft checkpoint {given}: draft_vocab_size {D!r} is not accepted, only 1 to {target.vocab_size}"
        )
    config = draft_config(target, D, _name(dtype), fingerprint)
    config |= {name: getattr(llama, name) for name in (*_COPIED, *_OWN)}
    config |= {name: raw[name] for name in _KEPT if name in raw}
    config[FINGERPRINT_KEY] = raw.get(FINGERPRINT_KEY) or fingerprint
    d2t = tensors.setdefault("d2t", torch.zeros(D, dtype=torch.int64))
    if "t2d" not in tensors and d2t.shape == (D,):
        tensors["t2d"] = torch.isin(torch.arange(target.vocab_size), d2t + torch.arange(D))
    check_tensors(given, config, tensors, fingerprint)
    save_checkpoint(out, config, tensors)
    return out


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


def check_begun_from(given: Path, draft: Path, target_path: Path, settings: TrainingSettings) -> None:
    """That ``given`` is what an earlier life of the run folder made ``draft`` of.

    Raises:
        SettingsError: it is another draft.
        CheckpointError: as ``import_draft``.
    """
    with TemporaryDirectory(dir=draft.parent) as name:
        if noted_content(import_draft(given, target_path, Path(name))) == noted_content(draft):
            return
    raise SettingsError(
        f"run folder {settings.run_dir} began from another draft than {given}; give that one, or another run folder"
    )


def _read_given(folder: Path) -> dict[str, torch.Tensor]:
    """Drafts published by others may be a ``pytorch_model.bin``; what is swapped in never is."""
    file = folder / "pytorch_model.bin"
    if (folder / "model.safetensors").exists() or not file.exists():
        return read_tensors(folder)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of rubbish, the unpickler raises anything
        raise CheckpointError(f"draft checkpoint {folder}: {file.name} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"draft checkpoint {folder}: {file.name} holds something else than tensors by name")
    return tensors


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
        "rope_parameters": _rope_parameters(target),
        "tie_word_embeddings": False,
        "dtype": dtype,
        FINGERPRINT_KEY: fingerprint,
        **{name: getattr(target, name, None) for name in _COPIED},
    }


def _rope_parameters(target: PretrainedConfig) -> dict[str, Any]:
    """The target's, or those of its layers with full attention where they have others than the rest.

    A draft turns the whole of a head, by one position a token: of a target that turns a part it has the base alone, of
    one that reads images nothing of their rows and columns, which for text are that one position.
    """
    found = target.rope_parameters
    found = found.get("full_attention", found)
    if found["rope_type"] not in _ROTARY or found.get("partial_rotary_factor", 1.0) != 1.0:
        return {"rope_type": "default", "rope_theta": found["rope_theta"]}
    return {name: value for name, value in found.items() if name not in _OF_IMAGES}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
