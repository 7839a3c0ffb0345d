"""A bounded ring of host memory: the scheduler thread fills it, the exporter thread empties it."""

import logging
from collections import deque

import torch

from sglang_specforge.shared_memory import SegmentRefused, SharedSegment

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


class Region:
    """A contiguous piece of the ring, ``offset`` bytes from its beginning; ``bytes`` is its uint8 tensor."""

    __slots__ = ("bytes", "end", "free", "offset")

    def __init__(self, data: torch.Tensor, offset: int, end: int) -> None:
        self.bytes, self.offset, self.end, self.free = data, offset, end, False


class HostRing:
    """Hands out regions in order and takes them back in any order; memory returns in order.

    One thread reserves and one releases. Each only writes its own of the two counters, so they share no lock.
    The memory is a ``segment`` that another process can open, or the process's own where that cannot be had.
    """

    def __init__(self, capacity_bytes: int, pinned: bool) -> None:
        self.segment, self.unshared = None, ""  # why there is no segment
        try:
            self.segment = SharedSegment(capacity_bytes, pinned)
            self._memory = self.segment.ring
        except SegmentRefused as error:
            self.unshared = str(error)
            logger.warning("draft training: captured states are sent through sockets: %s", error)
            self._memory = torch.empty(capacity_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._reserved = 0  # bytes ever reserved, padding included; written by the reserving thread
        self._origin = 0  # likewise: how many had been when the ring was last found empty, and begun anew
        self._released = 0  # bytes ever released; written by the releasing thread
        self._regions: deque[Region] = deque()

    @property
    def capacity_bytes(self) -> int:
        return self._memory.numel()

    @property
    def used_bytes(self) -> int:
        return self._reserved - self._released

    def room_bytes(self) -> int:
        """The largest region that can be had now; releasing only adds to it. Of the reserving thread."""
        free, tail = self.capacity_bytes - self.used_bytes, self.capacity_bytes - self._find_place()
        return free if free <= tail else max(tail, free - tail)

    def reserve(self, nbytes: int) -> Region | None:
        """A region of ``nbytes``, or None where there is no room for it now."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        start = self._find_place()
        skipped = 0 if start + size <= self.capacity_bytes else self.capacity_bytes - start
        if self.used_bytes + skipped + size > self.capacity_bytes:
            return None
        start = 0 if skipped else start
        region = Region(self._memory[start : start + nbytes], start, self._reserved + skipped + size)
        self._regions.append(region)
        self._reserved = region.end
        return region

    def _find_place(self) -> int:
        """Where the next region begins, if it ends before the ring does; an empty one is begun anew."""
        if not self.used_bytes:
            self._origin = self._reserved
        return (self._reserved - self._origin) % self.capacity_bytes

    def release(self, region: Region) -> None:
        """Give a region back; from the releasing thread only."""
        region.free = True
        while self._regions and self._regions[0].free:
            self._released = self._regions.popleft().end
