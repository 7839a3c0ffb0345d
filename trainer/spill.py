"""Captured rows that memory has no room for, on disk.

They are in one file without a name: nobody else can open it, and the kernel takes it back when the process ends,
however it ends. It is cut into slots of one size.
"""

import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.rows import Rows

logger = logging.getLogger(__name__)


class Slot(NamedTuple):
    """Where rows lie in the file, one tensor after another, and what they are."""

    offset: int  # bytes
    like: Rows  # on the meta device


class Spill:
    """A file of at most ``capacity_bytes`` in ``folder``, for rows of at most ``slot_bytes`` each.

    Raises:
        OSError: no file can be made in the folder.
    """

    def __init__(self, folder: Path, capacity_bytes: int, slot_bytes: int) -> None:
        fd, name = tempfile.mkstemp(dir=folder)  # mode 0600
        os.unlink(name)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        self.slot_bytes, self._most_bytes = slot_bytes, capacity_bytes // slot_bytes * slot_bytes
        self._free: list[int] = []  # offsets of slots that were in use
        self._end = 0  # offset of the next slot that never was
        self._takes = True

    def has_room(self) -> bool:
        return bool(self._free) or self._end < self._most_bytes

    def write(self, rows: Rows) -> Slot | None:
        """None where the disk takes no more: logged once until it does again. Raises ValueError: larger than a slot."""
        if rows.nbytes > self.slot_bytes:
            raise ValueError(f"rows of {rows.nbytes} bytes for a slot of {self.slot_bytes}")
        offset = self._free.pop() if self._free else self._end
        try:
            pieces = [t.contiguous().view(torch.uint8).numpy() for t in rows if t.nbytes]
            if os.pwritev(self._file.fileno(), pieces, offset) < rows.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if offset < self._end:
                self._free.append(offset)
            if self._takes:
                logger.warning(
                    "draft training: prefixes cannot be spilled (%s); they are forgotten until they can", error.strerror
                )
            self._takes = False
            return None
        self._end, self._takes = max(self._end, offset + self.slot_bytes), True
        return Slot(offset, Rows(*(t.to("meta") for t in rows)))

    def read(self, slot: Slot) -> Rows | None:
        """None where the disk does not give them back."""
        content = bytearray(slot.like.nbytes)
        try:
            if os.preadv(self._file.fileno(), [content], slot.offset) < len(content):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            logger.warning("draft training: a spilled prefix cannot be read back (%s); it is forgotten", error.strerror)
            return None
        parts = torch.frombuffer(content, dtype=torch.uint8).split([t.nbytes for t in slot.like])
        return Rows(*(part.view(t.dtype).view(t.shape) for part, t in zip(parts, slot.like, strict=True)))

    def free(self, slot: Slot) -> None:
        self._free.append(slot.offset)

    def close(self) -> None:
        self._file.close()
