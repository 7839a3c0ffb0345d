"""Captured states of prefixes, for samples whose beginning came from the server's prefix cache and was not computed.

A sequence is cut into blocks of 64 tokens, each keyed by a hash of its tokens and of the key before it, so a key stands
for a block and all that lies before it, and the first of them for the target. A block that ends a sequence may be
shorter; it gives way to a longer one that begins with it. What a cached prefix ends in is found among the blocks that
begin with its tokens, whatever length the server cached. Blocks are shared by all sequences that begin alike. When
their bytes exceed the budget, the least recently used leave memory, for the disk where there is a spill; there they
stay until it is full too, and are read from it when they are wanted. Shapes: T tokens of a sequence, H hidden.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_specforge.contracts.control import PrefixCounts
from sglang_specforge.contracts.spans import PLACE_BYTES
from trainer.rows import Rows
from trainer.spill import Slot, Spill

BLOCK = 64  # tokens
_TOKEN_BYTES = 8


def block_bytes(hidden_size: int, dtype: torch.dtype, with_embeds: bool = False) -> int:
    """Of a whole block's rows, each with an embedding or none: what a slot of the spill has to hold."""
    state_bytes = hidden_size * dtype.itemsize
    return BLOCK * (_TOKEN_BYTES + 4 * state_bytes + (state_bytes + PLACE_BYTES if with_embeds else 0))


class _Block(NamedTuple):
    parent: bytes
    tokens: bytes  # of int64

    @property
    def branch(self) -> tuple[bytes, bytes]:
        """Blocks that may begin alike have this in common."""
        return self.parent, self.tokens[:_TOKEN_BYTES]


class Restored(NamedTuple):
    """Of a prefix, from position ``start`` to its end."""

    start: int
    rows: Rows


class PrefixStore:
    """Holds at most ``capacity_bytes`` of states of one target, known by its fingerprint. ``counts`` tells its use.

    Args:
        spill: takes the blocks that leave memory; its slots hold ``BLOCK`` positions.
    """

    def __init__(self, target_fingerprint: str, capacity_bytes: int, spill: Spill | None = None) -> None:
        self._root, self._capacity_bytes, self._spill = target_fingerprint.encode(), capacity_bytes, spill
        self._blocks: dict[bytes, _Block] = {}
        self._held: OrderedDict[bytes, Rows] = OrderedDict()  # least recently used first
        self._spilled: OrderedDict[bytes, Slot] = OrderedDict()  # likewise; a block is in one of the two
        self._branches: dict[tuple[bytes, bytes], set[bytes]] = {}
        self.counts = PrefixCounts()

    def put(self, tokens_T: Tensor, first: int, rows: Rows) -> None:
        """Keep the rows, of the positions from ``first`` on; ``tokens_T`` (int64) are the whole sequence's."""
        if not self._capacity_bytes:
            return
        used = []
        for start, parent, tokens in self._cut(tokens_T):
            key = self._find(parent, tokens)
            end = start + len(tokens) // _TOKEN_BYTES
            if key is None and end > first:
                own = rows.pick(slice(max(0, start - first), end - first))
                key = self._keep(parent, tokens, first - start, own)
            used += [key] if key else []
        self._touch(used)
        while self.counts.stored_bytes > self._capacity_bytes:
            self._move_out(next(iter(self._held)))

    def restore(self, tokens_T: Tensor) -> Restored | None:
        """Rows of the end of this prefix (int64), as far back as there are any without a hole; counted."""
        keys = [self._find(parent, tokens) for _, parent, tokens in self._cut(tokens_T)]
        found: list[Rows] = []
        while keys and (rows := self._rows(keys[-1])):
            found.insert(0, rows)
            self._touch([keys.pop()])
        start = min(BLOCK * len(keys), len(tokens_T))
        self.counts.prefixes += 1
        self.counts.whole_prefixes += start == 0
        self.counts.restored_tokens += len(tokens_T) - start
        self.counts.missing_tokens += start
        if start == len(tokens_T):
            return None
        return Restored(start, Rows.joined(found).pick(slice(len(tokens_T) - start)))

    def _keep(self, parent: bytes, tokens: bytes, cached: int, rows: Rows) -> bytes | None:
        """Insert a block whose rows begin after its first ``cached`` tokens; those have to be here already."""
        parts = [rows]
        if cached > 0:
            begins = self._rows(self._find(parent, tokens[: _TOKEN_BYTES * cached]))
            if begins is None:
                return None
            parts = [begins.pick(slice(cached)), rows]
        return self._insert(_Block(parent, tokens), Rows.joined(parts))

    def _cut(self, tokens_T: Tensor) -> Iterator[tuple[int, bytes, bytes]]:
        """First position, the key before it, and tokens of each block."""
        content, parent = tokens_T.numpy().tobytes(), self._root
        for start in range(0, len(tokens_T), BLOCK):
            tokens = content[_TOKEN_BYTES * start : _TOKEN_BYTES * (start + BLOCK)]
            yield start, parent, tokens
            parent = _key(parent, tokens)

    def _find(self, parent: bytes, tokens: bytes) -> bytes | None:
        """Key of the block that is these tokens or begins with them."""
        if (key := _key(parent, tokens)) in self._blocks:
            return key
        if len(tokens) == _TOKEN_BYTES * BLOCK:
            return None
        alike = self._branches.get(_Block(parent, tokens).branch, ())
        return next((key for key in alike if self._blocks[key].tokens.startswith(tokens)), None)

    def _touch(self, keys: list[bytes]) -> None:
        """Of blocks one after another: what lies before others is used the latest, so it leaves after them."""
        for key in reversed(keys):
            if key in self._blocks:
                (self._held if key in self._held else self._spilled).move_to_end(key)

    def _rows(self, key: bytes | None) -> Rows | None:
        """Of a block; None where there is none, or where it cannot be read back: then it is forgotten."""
        if key not in self._spilled:
            return self._held.get(key)
        rows = self._spill.read(self._spilled[key])
        if rows is None:
            self._forget(key)
            self.counts.unspilled_blocks += 1
        return rows

    def _insert(self, block: _Block, rows: Rows) -> bytes:
        for key in list(self._branches.get(block.branch, ())):
            if block.tokens.startswith(self._blocks[key].tokens):
                self._remove(key)
        key = _key(block.parent, block.tokens)
        self._blocks[key], self._held[key] = block, rows
        self._branches.setdefault(block.branch, set()).add(key)
        self.counts.stored_bytes += rows.nbytes + len(block.tokens)
        return key

    def _move_out(self, key: bytes) -> None:
        """Of memory: to the disk where it takes the block, which may cost the ones there that were used least."""
        if self._spill is None or self._held[key].nbytes > self._spill.slot_bytes:
            self._forget(key)
            return
        while self._spilled and not self._spill.has_room():
            self._forget(next(iter(self._spilled)))
        slot = self._spill.write(self._held[key]) if self._spill.has_room() else None
        if slot is None:
            self._forget(key)
            self.counts.unspilled_blocks += 1
            return
        self._leave(key)
        self._spilled[key] = slot
        self.counts.spilled_bytes += self._spill.slot_bytes

    def _forget(self, key: bytes) -> None:
        self._remove(key)
        self.counts.evicted_blocks += 1

    def _remove(self, key: bytes) -> None:
        self._leave(key)
        block = self._blocks.pop(key)
        alike = self._branches[block.branch]
        alike.remove(key)
        if not alike:
            del self._branches[block.branch]

    def _leave(self, key: bytes) -> None:
        """The place where its states are."""
        if key in self._held:
            self.counts.stored_bytes -= self._held.pop(key).nbytes + len(self._blocks[key].tokens)
        else:
            self._spill.free(self._spilled.pop(key))
            self.counts.spilled_bytes -= self._spill.slot_bytes


def _key(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()
