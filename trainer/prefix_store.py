"""Captured states of prefixes, for samples whose beginning came from the server's prefix cache and was not computed.

A sequence is cut into blocks of 64 tokens, each keyed by a hash of its tokens and of the key before it, so a key stands
for a block and all that lies before it, and the first of them for the target. A block that ends a sequence may be
shorter; it gives way to a longer one that begins with it. What a cached prefix ends in is found among the blocks that
begin with its tokens, whatever length the server cached. Blocks are shared by all sequences that begin alike and leave,
least recently used first, when their bytes exceed the budget. Shapes: T tokens of a sequence, H hidden.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_specforge.contracts.control import PrefixCounts

_BLOCK = 64  # tokens


class _Block(NamedTuple):
    parent: bytes
    tokens: bytes  # of int32
    aux_T3H: Tensor
    last_TH: Tensor

    @property
    def bytes(self) -> int:
        return self.aux_T3H.nbytes + self.last_TH.nbytes + len(self.tokens)

    @property
    def branch(self) -> tuple[bytes, bytes]:
        """Blocks that may begin alike have this in common."""
        return self.parent, self.tokens[:4]


class Restored(NamedTuple):
    """States of a prefix, from position ``start`` to its end."""

    start: int
    aux_T3H: Tensor
    last_TH: Tensor


class PrefixStore:
    """Holds at most ``capacity_bytes`` of states of one target, known by its fingerprint. ``counts`` tells its use."""

    def __init__(self, target_fingerprint: str, capacity_bytes: int) -> None:
        self._root, self._capacity_bytes = target_fingerprint.encode(), capacity_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
        self._branches: dict[tuple[bytes, bytes], set[bytes]] = {}
        self.counts = PrefixCounts()

    def put(self, tokens_T: Tensor, first: int, aux_T3H: Tensor, last_TH: Tensor) -> None:
        """Keep states of the positions from ``first`` on; ``tokens_T`` (int64) are the whole sequence's."""
        if not self._capacity_bytes:
            return
        used = []
        for start, parent, tokens in self._cut(tokens_T):
            key = self._find(parent, tokens)
            if key is None and start + len(tokens) // 4 > first:
                rows = slice(max(0, start - first), None)
                key = self._keep(parent, tokens, first - start, aux_T3H[rows], last_TH[rows])
            used += [key] if key else []
        self._touch(used)
        while self.counts.stored_bytes > self._capacity_bytes:
            self._remove(next(iter(self._blocks)))
            self.counts.evicted_blocks += 1

    def restore(self, tokens_T: Tensor) -> Restored | None:
        """States of the end of this prefix (int64), as far back as there are any without a hole; counted."""
        keys = [self._find(parent, tokens) for _, parent, tokens in self._cut(tokens_T)]
        holes = [i for i, key in enumerate(keys) if key is None]
        first = holes[-1] + 1 if holes else 0
        start = min(_BLOCK * first, len(tokens_T))
        self._touch(keys[first:])
        self.counts.prefixes += 1
        self.counts.whole_prefixes += start == 0
        self.counts.restored_tokens += len(tokens_T) - start
        self.counts.missing_tokens += start
        if start == len(tokens_T):
            return None
        blocks, rows = [self._blocks[key] for key in keys[first:]], slice(len(tokens_T) - start)
        aux_T3H, last_TH = (torch.cat([getattr(b, name) for b in blocks])[rows] for name in ("aux_T3H", "last_TH"))
        return Restored(start, aux_T3H, last_TH)

    def _keep(self, parent: bytes, tokens: bytes, cached: int, aux_T3H: Tensor, last_TH: Tensor) -> bytes | None:
        """Insert a block whose rows begin after its first ``cached`` tokens; those have to be here already."""
        length = len(tokens) // 4 - max(0, cached)
        rows = aux_T3H[:length].clone(), last_TH[:length].clone()
        if cached > 0:
            begins = self._find(parent, tokens[: 4 * cached])
            if begins is None:
                return None
            block = self._blocks[begins]
            rows = torch.cat([block.aux_T3H[:cached], rows[0]]), torch.cat([block.last_TH[:cached], rows[1]])
        return self._insert(_Block(parent, tokens, *rows))

    def _cut(self, tokens_T: Tensor) -> Iterator[tuple[int, bytes, bytes]]:
        """First position, the key before it, and tokens of each block."""
        content, parent = tokens_T.to(torch.int32).numpy().tobytes(), self._root
        for start in range(0, len(tokens_T), _BLOCK):
            tokens = content[4 * start : 4 * (start + _BLOCK)]
            yield start, parent, tokens
            parent = _key(parent, tokens)

    def _find(self, parent: bytes, tokens: bytes) -> bytes | None:
        """Key of the block that is these tokens or begins with them."""
        if (key := _key(parent, tokens)) in self._blocks:
            return key
        if len(tokens) == 4 * _BLOCK:
            return None
        alike = self._branches.get((parent, tokens[:4]), ())
        return next((key for key in alike if self._blocks[key].tokens.startswith(tokens)), None)

    def _touch(self, keys: list[bytes]) -> None:
        """Of blocks one after another: what lies before others is used the latest, so it leaves after them."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _insert(self, block: _Block) -> bytes:
        for key in list(self._branches.get(block.branch, ())):
            if block.tokens.startswith(self._blocks[key].tokens):
                self._remove(key)
        key = _key(block.parent, block.tokens)
        self._blocks[key] = block
        self._branches.setdefault(block.branch, set()).add(key)
        self.counts.stored_bytes += block.bytes
        return key

    def _remove(self, key: bytes) -> None:
        block = self._blocks.pop(key)
        alike = self._branches[block.branch]
        alike.remove(key)
        if not alike:
            del self._branches[block.branch]
        self.counts.stored_bytes -= block.bytes


def _key(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()
