"""Draft checkpoints as SGLang loads them: layout and checks.

A checkpoint is a folder with ``config.json`` and ``model.safetensors``. For a target vocabulary V and a draft
vocabulary D, ``d2t`` [D] holds, for each draft id, the target id minus the draft id; ``t2d`` [V] says which target ids
the draft knows. Its other tensors are those of its kind (``sglang_specforge.drafts``).
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sglang_specforge.drafts import CheckpointError, expected_shapes, kind_of

FINGERPRINT_KEY = "specforge_target_fingerprint"
CONTENT_KEY = "specforge_sha256"  # of model.safetensors, as it was written here

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
_IDS = (torch.int64, torch.int32, torch.bool)


def save_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint; readers that find ``config.json`` find all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    save_config(folder, {**config, CONTENT_KEY: content_of(folder)})


def content_of(folder: Path) -> str:
    """SHA-256 of ``model.safetensors``. Raises OSError."""
    with (folder / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``, all at once."""
    staged = folder / "config.json.part"
    staged.write_text(json.dumps(config, indent=2) + "\n")
    staged.replace(folder / "config.json")


def load_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint, as it is. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:  # ValueError: not JSON, not text, or no path that a system has
        raise CheckpointError(f"draft checkpoint {folder}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"draft checkpoint {folder}: config.json holds no object, but {str(config)[:80]!r}")
    return config


def noted_content(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's weights, as its config has it; None where that was not noted, or it is gone."""
    with contextlib.suppress(CheckpointError):
        return load_config(folder).get(CONTENT_KEY)


def load_checked(folder: Path, served: dict[str, Any], fingerprint: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint that may take the place of the draft whose config is ``served``.

    Raises:
        CheckpointError: it was trained for another target, a tensor is missing, unknown, of another shape, or
            not finite, ``d2t`` and ``t2d`` do not describe one draft vocabulary, a setting that changes what the
            weights compute differs from the served one, or the weights are not those that were written.
    """
    config, tensors = load_config(folder), read_tensors(folder)
    check_tensors(folder, {**served, FINGERPRINT_KEY: config.get(FINGERPRINT_KEY)}, tensors, fingerprint)
    for name in kind_of(served).computed_with:
        if (config.get(name) or None) != (served.get(name) or None):
            raise CheckpointError(
                f"draft checkpoint {folder}: {name} is {config.get(name)!r}, of the served draft {served.get(name)!r}"
            )
    if (written := config.get(CONTENT_KEY)) not in (None, found := content_of(folder)):
        raise CheckpointError(f"draft checkpoint {folder}: SHA-256 of model.safetensors is {found}, not {written}")
    return tensors


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"draft checkpoint {folder}: model.safetensors cannot be read: {error}") from error


def check_tensors(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], fingerprint: str) -> None:
    """``config`` gives the shapes that are asked for, and the fingerprint that was found."""
    found = config[FINGERPRINT_KEY]
    if found != fingerprint:
        raise CheckpointError(
            f"draft checkpoint {folder}: target fingerprint {found!r} is not that of the served target "
            f"{fingerprint!r}; train it on this target"
        )
    shapes = expected_shapes(config)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        what = "is missing" if name in shapes else "is not part of such a draft"
        raise CheckpointError(f"draft checkpoint {folder}: tensor {name} {what}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"draft checkpoint {folder}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                f"the served draft {shape}"
            )
        if tensors[name].dtype not in (accepted := _IDS if name in ("d2t", "t2d") else _NUMBERS):
            raise CheckpointError(
                f"draft checkpoint {folder}: tensor {name} has dtype {tensors[name].dtype}; "
                f"accepted are {', '.join(map(str, accepted))}"
            )
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise CheckpointError(f"draft checkpoint {folder}: tensor {name} has values that are not finite")
    known_D = tensors["d2t"] + torch.arange(shapes["d2t"][0])
    if not torch.equal(known_D, tensors["t2d"].nonzero().flatten()):
        raise CheckpointError(f"draft checkpoint {folder}: tensors d2t and t2d disagree about the draft vocabulary")
