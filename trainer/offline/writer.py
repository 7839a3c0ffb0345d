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


class DatasetWriter:
    """Buffers samples up to ``shard_bytes``; a shard counts once its index has its final name."""

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int) -> None:
        self._folder, self._manifest = folder, manifest
        self._shard_rows = max(1, shard_bytes // manifest.row_bytes)
        if (folder / "dataset.json").exists():
            _check_same(folder, Manifest.load(folder), manifest)
        manifest.save(folder)
        for name in ("shards", "index"):
            (folder / name).mkdir(exist_ok=True)
        self.stored_ids = {
            id for file in index_paths(folder) for id in pq.read_table(file, columns=["id"])["id"].to_pylist()
        }
        self._rows: list[dict[str, Tensor]] = []
        self._entries: list[dict[str, object]] = []
        self._buffered_rows = 0

    def add(
        self, id: str, tokens_T: Tensor, generated_T: Tensor, aux_T3H: Tensor, last_TH: Tensor, slice: str = ""
    ) -> None:
        rows = encode(self._manifest, tokens_T, generated_T, aux_T3H, last_TH)
        length = tokens_T.numel()
        if self._rows and self._buffered_rows + length > self._shard_rows:
            self.flush()
        self._entries.append(
            {
                "id": id, "row": self._buffered_rows, "length": length,
                "generated_tokens": int(generated_T.sum()), "checksum": checksum(rows), "slice": slice,
            }
        )  # fmt: skip
        self._rows.append(rows)
        self._buffered_rows += length
        self.stored_ids.add(id)

    def flush(self) -> None:
        """Write what is buffered as one shard."""
        if not self._rows:
            return
        tensors = {name: torch.cat([rows[name] for rows in self._rows]) for name in self._rows[0]}
        part = self._folder / "shards" / "part"
        save_file(tensors, part, metadata=metadata_of(self._manifest))
        part.chmod(0o600)  # what people asked and got
        name = _digest(tensors)
        part.replace(shard_path(self._folder, name))
        index_part = self._folder / "index" / "part"
        pq.write_table(pa.Table.from_pylist(self._entries, schema=INDEX), index_part)
        index_part.chmod(0o600)
        index_part.replace(self._folder / "index" / f"{name}.parquet")
        self._rows, self._entries, self._buffered_rows = [], [], 0


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
