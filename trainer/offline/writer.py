"""Writing a stored dataset, shard by shard; what was written before is kept and not written again."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.offline.layout import (
    INDEX,
    DatasetError,
    Manifest,
    bytes_of,
    checksum,
    encode,
    index_paths,
    metadata_of,
    shard_path,
)
from trainer.rows import Rows


class DatasetWriter:
    """Buffers samples up to ``shard_bytes``; a shard counts once its index has its final name."""

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int) -> None:
        self._folder, self._manifest = folder, manifest
        self._shard_bytes = shard_bytes
        if (folder / "dataset.json").exists():
            _check_same(folder, Manifest.load(folder), manifest)
        manifest.save(folder)
        for name in ("shards", "index"):
            (folder / name).mkdir(exist_ok=True)
        self.stored_ids = {
            id for file in index_paths(folder) for id in pq.read_table(file, columns=["id"])["id"].to_pylist()
        }
        self._begin_shard()

    def add(self, id: str, rows: Rows, generated_T: Tensor, slice: str = "") -> None:
        stored = encode(self._manifest, rows, generated_T)
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        if self._stored and self._nbytes + nbytes > self._shard_bytes:
            self.flush()
        length, image_rows = len(rows.tokens_N), len(rows.embeds_MH)
        self._entries.append(
            {
                "id": id, "row": self._length, "length": length, "generated_tokens": int(generated_T.sum()),
                "checksum": checksum(stored), "slice": slice, "image_row": self._image_rows, "image_rows": image_rows,
            }
        )  # fmt: skip
        self._stored.append(stored)
        self._nbytes += nbytes
        self._length += length
        self._image_rows += image_rows
        self.stored_ids.add(id)

    def flush(self) -> None:
        """Write what is buffered as one shard."""
        if not self._stored:
            return
        tensors = {name: torch.cat([stored[name] for stored in self._stored]) for name in self._stored[0]}
        part = self._folder / "shards" / "part"
        save_file(tensors, part, metadata=metadata_of(self._manifest))
        part.chmod(0o600)  # what people asked and got
        name = _digest(tensors)
        part.replace(shard_path(self._folder, name))
        index_part = self._folder / "index" / "part"
        pq.write_table(pa.Table.from_pylist(self._entries, schema=INDEX), index_part)
        index_part.chmod(0o600)
        index_part.replace(self._folder / "index" / f"{name}.parquet")
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._stored: list[dict[str, Tensor]] = []
        self._entries: list[dict[str, object]] = []
        self._nbytes = self._length = self._image_rows = 0


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of what a shard holds; the file's own bytes also depend on the order that safetensors wrote its header in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()[:32]


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    for name in ("target_fingerprint", "served_dtype", "stored", "hidden_size"):
        if getattr(found, name) != getattr(wanted, name):
            raise DatasetError(
                f"{folder} holds states with {name} {getattr(found, name)}, these have {getattr(wanted, name)}; "
                "give another --out"
            )
