"""Prepared data: one row a sequence, its token ids and which of them are an assistant's. A Parquet file."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sglang_specforge.images import as_sent

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("slice", pa.string()),
        ("images", pa.list_(pa.string())),
    ]
)
_ROWS = 256


class PreparedError(ValueError):
    """A file is not what ``prepare-data`` writes; the message names it."""


class Prepared(NamedTuple):
    """One sequence. ``id`` is a digest of tokens, mask and images, so equal sequences have equal ids."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]
    slice: str  # where it came from
    images: Sequence[str] = ()  # references (``sglang_specforge.images``) to those that it shows, in order

    def count_into(self, counts_V: torch.Tensor) -> int:
        """Add its learnt tokens to their counts; returns how many they are. Ids past the vocabulary are left out."""
        learnt = torch.tensor(self.input_ids)[torch.tensor(self.loss_mask)]
        counts_V += learnt[learnt < counts_V.numel()].bincount(minlength=counts_V.numel())
        return learnt.numel()

    @classmethod
    def of(cls, input_ids: list[int], loss_mask: list[bool], images: Sequence[str] = (), slice: str = "") -> "Prepared":
        """Raises OSError where an image can no longer be read."""
        digest = hashlib.sha256(np.asarray(input_ids, np.int32).tobytes())
        digest.update(np.packbits(np.asarray(loss_mask, bool)).tobytes())
        digest.update("".join(as_sent(images)).encode())
        return cls(digest.hexdigest(), input_ids, loss_mask, slice, images)


class PreparedFile:
    """Reads a file a batch of rows at a time. Raises PreparedError."""

    def __init__(self, file: Path) -> None:
        try:
            self._file = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise PreparedError(f"{file} is no Parquet file of prepare-data's: {error}") from error
        self._columns = [name for name in SCHEMA.names if name in self._file.schema_arrow.names]
        missing = set(SCHEMA.names) - {"images"} - set(self._columns)
        if missing:
            raise PreparedError(f"{file} has no column {', '.join(sorted(missing))}; make it with prepare-data")

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def count_tokens(self, vocab_size: int) -> torch.Tensor:
        """How often each token is one to be learnt, int64 [V]."""
        counts_V = torch.zeros(vocab_size, dtype=torch.int64)
        for sequence in self:
            sequence.count_into(counts_V)
        return counts_V

    def __iter__(self) -> Iterator[Prepared]:
        for batch in self._file.iter_batches(_ROWS, columns=self._columns):
            yield from (Prepared(*row.values()) for row in batch.to_pylist())
