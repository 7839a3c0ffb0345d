"""What the plugin and the trainer read of the target's checkpoint: configuration, identity, embedding and head."""

import hashlib
import json
import logging
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from sglang_specforge.llama import as_llama

logger = logging.getLogger(__name__)

MIN_LAYERS = 8  # below, the default capture layers [2, n//2, n-3] of SGLang coincide
_BLOCKS, _BLOCK_BYTES = 64, 4096
_READ = ("*.json", "*.safetensors", "*.py", "pytorch_model.bin")  # some drafts are there in the last alone
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_QUANTIZED = ("qweight", "weight_packed")  # GPTQ and AWQ; compressed-tensors
# Where families have them: models of text, and those that read images too.
_EMBEDDING = ("model.embed_tokens", "model.language_model.embed_tokens", "language_model.model.embed_tokens")
_HEAD = ("lm_head", "language_model.lm_head")
_MODELS = ("text_config", "vision_config", "audio_config")
_CONFIGURED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class TargetError(ValueError):
    """The target cannot be used; the message names the file or tensor and what is needed."""


def resolve_target(model_path: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Local folder of a model given as a folder or as a Hugging Face repository, of which what is read here is fetched.

    Raises:
        TargetError: it is neither, or cannot be fetched.
    """
    path = Path(model_path)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model_path, revision=revision, cache_dir=cache_dir, allow_patterns=_READ))
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise TargetError(
            f"{model_path!r} is no folder here and cannot be fetched from Hugging Face ({why}); give the model's "
            "folder, or a name that can be fetched"
        ) from error


def load_target_config(folder: Path) -> PretrainedConfig:
    """Text configuration of the target; of one that transformers does not know, as far as it is read here.

    Raises:
        TargetError: it cannot be read, or the target is too shallow for three distinct capture layers.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        config = _config_as_written(folder, error)
    if config.num_hidden_layers < MIN_LAYERS:
        raise TargetError(
            f"target {folder} has {config.num_hidden_layers} layers; EAGLE3 captures layers 2, n//2 and n-3, "
            f"which needs at least {MIN_LAYERS}"
        )
    return config


def _config_as_written(folder: Path, unknown: Exception) -> PretrainedConfig:
    """Without what transformers, or code of the model's own, which is not run here, would make of it: what a draft
    takes over has the same names in all of them."""
    why = str(unknown).partition("\n")[0]
    try:
        written = json.loads((folder / "config.json").read_text())
        written = written.get("text_config", written)
        missing = [name for name in _CONFIGURED if name not in written]
        if missing:
            raise ValueError(f"{why}; and it has no {', '.join(missing)}")
        config = as_llama(written)
    except Exception as error:  # of rubbish, transformers raises anything
        raise TargetError(f"target {folder}: transformers cannot read its config.json ({error})") from unknown
    logger.warning("draft training: config.json of %s is read as it is written: %s", folder, why)
    return config


def reads_more_than_text(folder: Path) -> bool:
    """Whether the target's prompts may hold images or sounds: its config.json is of several models."""
    written = json.loads((folder / "config.json").read_text())
    return any(isinstance(part, dict) and name in _MODELS for name, part in written.items())


def final_softcap(config: PretrainedConfig) -> float | None:
    """What bounds the target's logits (Gemma): ``softcap * tanh(logits / softcap)``; None: nothing.

    As ``LogitsProcessor`` of SGLang reads it.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    return softcap if softcap and softcap > 0 else None


def fingerprint_target(folder: Path) -> str:
    """Identity of the target's weights: sha256 (hex, 16 digits) over every safetensors header and sampled blocks.

    Reads at most 256 KiB a file, so that it stays instant for targets of any size, yet two fine-tunes of one
    base differ.
    """
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_bytes))
            for block in range(_BLOCKS):
                stream.seek(8 + header_bytes + block * max(0, size - 8 - header_bytes - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def load_embedding_and_head(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's input embedding and ``lm_head``, both [V, H] (the same tensor when tied).

    Raises:
        TargetError: the embedding is missing, or one of the two is quantized (the other layers may be).
    """
    files = _files_by_tensor(folder)
    embed_VH, head_VH = (_load_weight(files, folder, modules) for modules in (_EMBEDDING, _HEAD))
    if embed_VH is None:
        raise TargetError(f"target {folder} has no embedding that is known here: {', '.join(_EMBEDDING)}")
    return embed_VH, embed_VH if head_VH is None else head_VH


def _load_weight(files: dict[str, Path], folder: Path, modules: tuple[str, ...]) -> torch.Tensor | None:
    """Of the module that the target has of these."""
    for module in modules:
        packed, weight = next((name for name in _QUANTIZED if f"{module}.{name}" in files), None), None
        if file := files.get(name := f"{module}.weight"):
            with safe_open(file, "pt") as tensors:
                weight = tensors.get_tensor(name)
            packed = None if weight.dtype in _PLAIN else f"weight of {weight.dtype}"
        if packed:
            raise TargetError(
                f"target {folder} has a quantized {module} ({packed}), which a draft cannot be trained against; give a "
                "checkpoint whose embedding and lm_head are not quantized"
            )
        if weight is not None:
            return weight
    return None


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TargetError(f"target {folder} has no *.safetensors file; draft training reads no other format")
    return files


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found = {}
    for file in _weight_files(folder):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found
