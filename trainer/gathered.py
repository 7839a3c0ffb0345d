"""A request's rows, gathered as its passes come, in memory of its own.

A pass brings a few rows of each of many requests, so what each costs is counted in microseconds: rows are copied as the
bytes that travelled, by numpy, whose slices cost a tenth of torch's, and states are made of them when they are wanted.
Shapes: N rows of a message, C of a chunk, W bytes wide.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_specforge.contracts.coding import unpack
from trainer.rows import Rows

_CHUNK = 32  # rows: few enough that a request of a few tokens takes little, and enough that they are not made often
_FREE_BYTES = 256 << 20


class Arrived:
    """A message's rows, in the memory that they came in."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.dtype = tensors["last_NH"].dtype
        self.tokens_N = tensors["tokens_N"].numpy()
        self.aux_NW, self.last_NW = (_bytes(tensors[name]) for name in ("aux_N3H", "last_NH"))
        self._embeds = None
        if "embeds_MH" in tensors:
            self._embeds = tensors["embeds_MH"], tensors["places_M3"]
            self._before_N = np.cumsum(self.tokens_N < 0)

    def embeds_of(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Copies of the embeddings of these rows, and of their places; None in a message that has none."""
        if self._embeds is None:
            return None
        last = int(self._before_N[rows.stop - 1])
        first = last - int(np.count_nonzero(self.tokens_N[rows] < 0))
        embeds_MH, places_M3 = (tensor[first:last].clone() for tensor in self._embeds)
        return embeds_MH, places_M3


class _Chunk(NamedTuple):
    tokens_C: np.ndarray
    aux_CW: np.ndarray
    last_CW: np.ndarray


class ChunkPool:
    """Memory for the rows of one stream, and that of requests which have ended for the next ones: pages that are new to
    a process cost it more than the copy into them."""

    def __init__(self) -> None:
        self._free: list[_Chunk] = []

    def take(self, like: Arrived) -> _Chunk:
        if self._free:
            return self._free.pop()
        rows = (like.tokens_N, like.aux_NW, like.last_NW)
        return _Chunk(*(np.empty((_CHUNK, *of_all.shape[1:]), of_all.dtype) for of_all in rows))

    def take_back(self, chunks: list[_Chunk]) -> None:
        """Up to ``_FREE_BYTES`` are kept, so that a burst is not paid for ever after."""
        for chunk in chunks:
            if (len(self._free) + 1) * sum(array.nbytes for array in chunk) <= _FREE_BYTES:
                self._free.append(chunk)


class Gathered:
    """The rows of a request, in the order that they came in."""

    def __init__(self, pool: ChunkPool) -> None:
        self._pool = pool
        self._chunks: list[_Chunk] = []
        self._embeds: list[tuple[Tensor, Tensor]] = []
        self._dtype: torch.dtype | None = None  # as they travel
        self._count = 0

    def add(self, arrived: Arrived, row: int, length: int) -> int:
        """Copy ``length`` rows of a message, from ``row`` on; returns the first one's place here."""
        place, self._dtype = self._count, arrived.dtype
        if (embeds := arrived.embeds_of(slice(row, row + length))) is not None:
            self._embeds.append(embeds)
        while length:
            if not (at := self._count % _CHUNK):
                self._chunks.append(self._pool.take(arrived))
            tokens_C, aux_CW, last_CW = self._chunks[-1]
            count = min(length, _CHUNK - at)
            there, here = slice(row, row + count), slice(at, at + count)
            tokens_C[here] = arrived.tokens_N[there]
            aux_CW[here] = arrived.aux_NW[there]
            last_CW[here] = arrived.last_NW[there]
            self._count, row, length = self._count + count, row + count, length - count
        return place

    def rows(self, first: int, end: int, dtype: torch.dtype | None) -> Rows:
        """Copies of the rows of these places, with states of this type (None: as they travelled, float8 as float32)."""
        if self._embeds:
            return self._all(dtype).pick(slice(first, end))
        return self._joined(first, end, dtype)

    def pick(self, place_T: np.ndarray, dtype: torch.dtype | None) -> Rows:
        """The same of places in any order (int64)."""
        first, end = int(place_T[0]), int(place_T[-1]) + 1
        if end - first == len(place_T) and (np.diff(place_T) == 1).all():
            return self.rows(first, end, dtype)
        return self._all(dtype).pick(torch.from_numpy(place_T))

    def let_go(self) -> None:
        """Of the memory; the rows are not wanted any more."""
        self._pool.take_back(self._chunks)
        self._chunks = []

    def _all(self, dtype: torch.dtype | None) -> Rows:
        rows = self._joined(0, self._count, dtype)
        if not self._embeds:
            return rows
        embeds_MH, places_M3 = map(torch.cat, zip(*self._embeds, strict=True))
        return rows._replace(embeds_MH=unpack(embeds_MH, dtype), places_M3=places_M3)

    def _joined(self, first: int, end: int, dtype: torch.dtype | None) -> Rows:
        parts = []
        for i in range(first // _CHUNK, -(-end // _CHUNK)):
            at = slice(max(first - i * _CHUNK, 0), end - i * _CHUNK)
            parts.append([array[at] for array in self._chunks[i]])
        tokens_N, aux_NW, last_NW = map(np.concatenate, zip(*parts, strict=True))
        states = (unpack(torch.from_numpy(rows_NW).view(self._dtype), dtype) for rows_NW in (aux_NW, last_NW))
        return Rows.of_text(torch.from_numpy(tokens_N), *states)


def _bytes(states: Tensor) -> np.ndarray:
    return states.contiguous().view(torch.uint8).numpy()
