"""Reading a stored dataset, memory-mapped; what is damaged is named and left out."""

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from trainer.offline.layout import (
    OF_IMAGES,
    DatasetError,
    Manifest,
    checksum,
    decode,
    index_paths,
    metadata_of,
    shard_path,
)
from trainer.sample import Sample, fields_of

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 64


class Entry(NamedTuple):
    """One stored sample."""

    id: str
    shard: str
    row: int
    length: int
    checksum: int
    slice: str
    image_row: int = 0
    image_rows: int = 0


class StoredSamples:
    """``entries`` of all shards that can be opened; ``damaged`` names the others, and samples found damaged later.

    Raises:
        DatasetError: there is no dataset, it is of another target, or nothing of it can be read.
    """

    def __init__(self, folder: Path, target_fingerprint: str | None = None) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        found = self.manifest.target_fingerprint
        if target_fingerprint is not None and found != target_fingerprint:
            raise DatasetError(
                f"{folder} holds states of target {found}, not of {target_fingerprint}; capture from this target"
            )
        self.damaged: list[str] = []
        self.entries: list[Entry] = []
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        for file in index_paths(folder):
            self._add_shard(file)
        self.entries.sort()  # by id, whatever shard they came to lie in
        if not self.entries:
            raise DatasetError(f"{folder} holds no sample that can be read: {'; '.join(self.damaged) or 'it is empty'}")

    @property
    def digest(self) -> str:
        """Identity of the samples and their order."""
        return hashlib.sha256("".join(entry.id for entry in self.entries).encode()).hexdigest()[:16]

    def count_tokens(self, vocab_size: int) -> torch.Tensor:
        """How often each token stands where the loss is taken, int64 [V]: what a draft vocabulary is chosen by."""
        counts_V = torch.zeros(vocab_size, dtype=torch.int64)
        for name in dict.fromkeys(entry.shard for entry in self.entries):
            shard = self._open(name)
            tokens_N, generated_N = shard.get_tensor("tokens"), shard.get_tensor("generated").bool()
            learnt_N = tokens_N[1:][generated_N[:-1]].long()
            counts_V += learnt_N[learnt_N < vocab_size].bincount(minlength=vocab_size)
        return counts_V

    def load(self, entry: Entry) -> Sample | None:
        """The sample, or None where its bytes are not those that were written."""
        try:
            shard = self._open(entry.shard)
            of_tokens = slice(entry.row, entry.row + entry.length)
            of_images = slice(entry.image_row, entry.image_row + entry.image_rows)
            stored = {
                name: shard.get_slice(name)[of_images if name in OF_IMAGES else of_tokens]
                for name in shard.keys()  # noqa: SIM118
            }
        except (OSError, SafetensorError, DatasetError) as error:
            return self._leave_out(entry, str(error))
        if checksum(stored) != entry.checksum:
            return self._leave_out(entry, "its bytes do not match their checksum")
        rows, generated_T = decode(self.manifest, stored)
        return Sample(
            rid=entry.id,
            start=0,
            **fields_of(rows),
            generated_T=generated_T,
            rejected_T=torch.full((entry.length,), -1),
            slice=entry.slice,
        )

    def _add_shard(self, index: Path) -> None:
        try:
            table = pq.read_table(index)
            self._open(index.stem)
        except (OSError, pa.ArrowException, SafetensorError, DatasetError) as error:
            self._note(f"shard {index.stem}: {error}")
            return
        self.entries += [
            Entry(shard=index.stem, **{name: row[name] for name in Entry._fields if name in row})
            for row in table.to_pylist()
        ]

    def _open_shard(self, name: str) -> Any:
        shard = safe_open(shard_path(self.folder, name), "pt")
        wanted = metadata_of(self.manifest)
        for key, value in (shard.metadata() or {}).items():
            if value != wanted.get(key):
                raise DatasetError(f"its {key} is {value}, the dataset's {wanted.get(key)}")
        return shard

    def _leave_out(self, entry: Entry, why: str) -> None:
        self._note(f"sample {entry.id[:16]} at row {entry.row} of shard {entry.shard}: {why}")

    def _note(self, what: str) -> None:
        if what not in self.damaged:
            self.damaged.append(what)
            logger.error("draft training: left out, training goes on without it: %s", what)
