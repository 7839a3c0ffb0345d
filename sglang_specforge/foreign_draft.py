"""Drafts that come from elsewhere, in the layout and with the names that drafts have here."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sglang_specforge.checkpoint import (
    FINGERPRINT_KEY,
    CheckpointError,
    check_tensors,
    load_config,
    noted_content,
    read_tensors,
    save_checkpoint,
)
from sglang_specforge.drafts import EAGLE3, EAGLE3_VARIANTS, kind_of
from sglang_specforge.llama import as_llama
from sglang_specforge.new_draft import COPIED, ROTARY, draft_config, name_of
from sglang_specforge.settings import SettingsError
from sglang_specforge.target import fingerprint_target, load_embedding_and_head, load_target_config
from sglang_specforge.training_settings import TrainingSettings

_OWN = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")
_KEPT = ("eagle_config", *EAGLE3_VARIANTS)  # the captured layers, where they are not the default ones, and variants
_TRAINABLE: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "tie_word_embeddings": (False, None),
}
_OLDER_NAMES = {
    "layers.0.": "midlayer.", "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}  # fmt: skip


def import_draft(given: Path, target_path: Path, out: Path) -> Path:
    """Write a draft from elsewhere to ``out``, in the layout and with the fingerprint that drafts have here.

    Of an EAGLE3 draft, the embedding is left out, as SGLang shares the target's; ``t2d`` is made where it is missing,
    and so is, of a draft that has the target's vocabulary, the head. Any other kind has to come in the layout that it
    has here.

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
    raw = _spelt_as_here(raw)
    for name, accepted in _TRAINABLE.items():
        if raw.get(name) not in accepted:
            raise CheckpointError(
                f"draft checkpoint {given}: {name} {raw.get(name)!r} cannot be trained, only {accepted[0]!r}"
            )
    tensors = {_name_here(name): tensor for name, tensor in _read_given(given).items() if "embed_tokens" not in name}
    target = load_target_config(target_path)
    try:
        llama = as_llama(raw)
    except Exception as error:  # of rubbish, transformers raises anything
        raise CheckpointError(f"draft checkpoint {given}: config.json is no Llama draft's: {error}") from error
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    D = raw.get("draft_vocab_size") or target.vocab_size
    if type(D) is not int or not 0 < D <= target.vocab_size:
        raise CheckpointError(
            f"draft checkpoint {given}: draft_vocab_size {D!r} is not accepted, only 1 to {target.vocab_size}"
        )
    if (kind := llama.rope_parameters["rope_type"]) not in ROTARY:
        raise CheckpointError(
            f"draft checkpoint {given}: rope_type {kind!r} cannot be trained, only {', '.join(ROTARY)}"
        )
    section = llama.rope_parameters.get("mrope_section")
    if section is not None and (len(section) != 3 or sum(section) != llama.head_dim // 2):
        raise CheckpointError(
            f"draft checkpoint {given}: mrope_section {section} is not accepted, only three numbers that add up to "
            f"{llama.head_dim // 2}, half of head_dim"
        )
    config = draft_config(target, D, name_of(dtype), fingerprint)
    config |= {name: getattr(llama, name) for name in (*COPIED, *_OWN)}
    config |= {name: raw[name] for name in _KEPT if name in raw}
    config[FINGERPRINT_KEY] = raw.get(FINGERPRINT_KEY) or fingerprint
    if raw.get("draft_vocab_size") is None and "lm_head.weight" not in tensors:  # SGLang serves it with the target's
        tensors["lm_head.weight"] = load_embedding_and_head(target_path)[1].to(dtype)
    d2t = tensors.setdefault("d2t", torch.zeros(D, dtype=torch.int64))
    if "t2d" not in tensors and d2t.shape == (D,):
        tensors["t2d"] = torch.isin(torch.arange(target.vocab_size), d2t + torch.arange(D))
    check_tensors(given, config, tensors, fingerprint)
    save_checkpoint(out, config, tensors)
    return out


def _spelt_as_here(raw: dict[str, Any]) -> dict[str, Any]:
    """What ``sglang.srt.models.llama_eagle3`` reads by other names as well, or in another place."""
    spelt, eagle = dict(raw), raw.get("eagle_config")
    if isinstance(eagle, dict) and "norm_before_fc" in eagle:
        spelt["norm_before_fc"] = eagle["norm_before_fc"]
        spelt["eagle_config"] = {name: value for name, value in eagle.items() if name != "norm_before_fc"}
    if raw.get("use_aux_norm"):
        spelt["fc_norm"] = True
    if raw.get("model_type") == "llama4_text" and "intermediate_size_mlp" in raw:
        spelt["intermediate_size"] = raw["intermediate_size_mlp"]
    return spelt


def _name_here(name: str) -> str:
    for older, here in _OLDER_NAMES.items():
        name = name.replace(older, here)
    return name.removeprefix("model.")


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
