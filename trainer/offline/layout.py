"""A stored dataset: what lies where, and how its tensors are coded.

A folder with ``dataset.json``, ``shards/<digest>.safetensors`` and, for each shard, ``index/<digest>.parquet``, named
by what the shard holds. Its samples lie end to end; the index says which rows are whose, with a checksum of their
bytes. What a target read in place of tokens, where its prompts showed images, lies end to end in tensors of its own.
Shapes: N rows of a shard, T of them a sample's, M of these of no token, H hidden.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from sglang_specforge.contracts.coding import FLOAT8, from_float8, target_row_bytes, to_float8
from trainer.rows import Rows

Stored = Literal["bfloat16", "float32", "float8"]
_FORMAT = 3
_READABLE = (2, _FORMAT)  # 2 has no images
OF_IMAGES = ("embeds", "embeds_scale", "places")  # tensors that have rows where a sample's have no token

INDEX = pa.schema(
    [
        ("id", pa.string()),  # of the sequence: sha256 of its tokens and loss mask
        ("row", pa.int64()),  # its first one in the shard
        ("length", pa.int32()),
        ("generated_tokens", pa.int32()),
        ("checksum", pa.uint64()),
        ("slice", pa.string()),
        ("image_row", pa.int64()),  # its first one in tensors of images
        ("image_rows", pa.int32()),
    ]
)


class DatasetError(ValueError):
    """A stored dataset cannot be used; the message names the file and what is wrong."""


class Manifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``dataset.json``."""

    target_fingerprint: str
    target_path: str  # where the server had it
    served_dtype: str
    hidden_size: int
    stored: Stored
    format: int = _FORMAT

    @property
    def row_bytes(self) -> int:
        """Bytes of one token: token id, loss mask, aux and last hidden states and, for float8, their two scales. Of an
        image's rows each has H numbers and three more."""
        travel = "served" if self.stored == "float32" else self.stored
        return 4 + 1 + target_row_bytes(self.hidden_size, "float32", travel)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "dataset.json.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self)))
        part.replace(folder / "dataset.json")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises DatasetError."""
        file = folder / "dataset.json"
        try:
            manifest = msgspec.json.decode(file.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise DatasetError(f"{file} cannot be read: {error}; is it a folder that capture wrote?") from error
        if manifest.format not in _READABLE:
            raise DatasetError(f"{file} is of format {manifest.format}; this version reads {_READABLE}")
        return manifest


def encode(manifest: Manifest, rows: Rows, generated_T: Tensor) -> dict[str, Tensor]:
    """Rows as they are stored."""
    stored = {
        "tokens": rows.tokens_N.clamp(min=-1).to(torch.int32),  # which image it is tells nothing here
        "generated": generated_T.to(torch.uint8),
        "places": rows.places_M3,
    }
    for name, states in (("aux", rows.aux_N3H), ("last", rows.last_NH), ("embeds", rows.embeds_MH)):
        if manifest.stored == "float8":
            stored[name], stored[f"{name}_scale"] = to_float8(states)
        else:
            stored[name] = states.to(getattr(torch, manifest.stored))
    return {name: stored[name].contiguous() for name in sorted(stored)}


def decode(manifest: Manifest, stored: dict[str, Tensor]) -> tuple[Rows, Tensor]:
    """The rows (float8 comes back as served), and which of them are generated (bool [T])."""
    served = getattr(torch, manifest.served_dtype)

    def states(name: str) -> Tensor:
        coded = stored[name]
        return from_float8(coded, stored[f"{name}_scale"]).to(served) if coded.dtype == FLOAT8 else coded

    rows = Rows.of_text(stored["tokens"].long(), states("aux"), states("last"))
    if "embeds" in stored:
        rows = rows._replace(embeds_MH=states("embeds"), places_M3=stored["places"])
    return rows, stored["generated"].bool()


def checksum(rows: dict[str, Tensor]) -> int:
    """xxh3 over the bytes of a sample's rows, tensor by tensor in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(rows):
        digest.update(bytes_of(rows[name]))
    return digest.intdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def shard_path(folder: Path, name: str) -> Path:
    return folder / "shards" / f"{name}.safetensors"


def index_paths(folder: Path) -> list[Path]:
    """Of all complete shards: the index is written last."""
    return sorted((folder / "index").glob("*.parquet"))


def metadata_of(manifest: Manifest) -> dict[str, Any]:
    """What each shard says of itself."""
    return {"format": "pt", "target_fingerprint": manifest.target_fingerprint, "stored": manifest.stored}
