"""Memory that an exporter and its reader share, so that captured states cross between them without being sent.

It is an anonymous file (``memfd_create(2)``), which the reader opens as ``/proc/PID/fd/N``: it has no name that could
be left behind, and is gone with the last of the two processes, however they end. Only a process of the same user in the
same process namespace can open it. Its size is sealed, so neither side can pull it from under the other.

Layout: a page of 8-byte counters, each written by one side alone, and the exporter's ring.
"""

import fcntl
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import torch

from sglang_specforge.contracts.spans import SegmentAddress
from sglang_specforge.sockets import is_alive

_NAME = "specforge"
HEADER_BYTES = 4096
READER, READ, RECLAIMED = range(3)  # counters
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1, 2, 4


class SegmentRefused(RuntimeError):
    """The memory cannot be had, or not be shared; the message says why."""


class _Counters:
    def __init__(self, memory: mmap.mmap) -> None:
        self._counter_C = np.frombuffer(memory, np.int64, count=HEADER_BYTES // 8)

    def __getitem__(self, counter: int) -> int:
        return int(self._counter_C[counter])

    def __setitem__(self, counter: int, value: int) -> None:
        self._counter_C[counter] = value


class SharedSegment:
    """The exporter's end. ``ring`` is a uint8 tensor of ``nbytes``, ``memory`` one that begins with the counters.

    Args:
        pinned: lock the pages for copies from the current CUDA device.

    Raises:
        SegmentRefused: there is not that much memory, or it cannot be pinned.
    """

    def __init__(self, nbytes: int, pinned: bool) -> None:
        size = HEADER_BYTES + nbytes
        try:
            self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, self._fd)  # or its memory would outlive it
            os.posix_fallocate(self._fd, 0, size)  # now, or a write would find no memory and kill the process
            fcntl.fcntl(self._fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
            # Now as well: a page that is new to this process costs the scheduler's copies more than they do themselves.
            memory = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise SegmentRefused(f"{size:,} bytes of shared memory cannot be had: {error.strerror}") from error
        self._counters = _Counters(memory)
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)
        self.ring = self.memory[HEADER_BYTES:]
        if pinned:
            _pin(self.ring)

    def address(self, reader: int) -> SegmentAddress:
        return SegmentAddress(os.getpid(), self._fd, reader)

    def is_read_by(self, reader: int) -> bool:
        """The reader with this number has opened the segment."""
        return self._counters[READER] == reader

    @property
    def read(self) -> int:
        """The newest message that the reader is done with."""
        return self._counters[READ]

    def reclaim(self, message: int) -> None:
        """From here on the memory of this and of earlier messages may be overwritten."""
        self._counters[RECLAIMED] = message


class OpenSegment:
    """The reader's end.

    Raises:
        SegmentRefused: it is not there for this process, or not such a segment.
    """

    def __init__(self, address: SegmentAddress) -> None:
        self._pid = address.pid
        path = Path(f"/proc/{address.pid}/fd/{address.fd}")
        try:
            # Whoever sends addresses could name any file of this user's: only a segment is opened, and never truncated.
            if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
                raise SegmentRefused(f"{path} is not a segment")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SegmentRefused(f"{path} cannot be opened: {error.strerror}") from error
        try:
            if not fcntl.fcntl(fd, _F_GET_SEALS) & _SEAL_SHRINK or os.fstat(fd).st_size <= HEADER_BYTES:
                raise SegmentRefused(f"{path} is not sealed")
            memory = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self._counters, self.ring = _Counters(memory), memoryview(memory)[HEADER_BYTES:]
        self._counters[READER] = address.reader

    def is_intact(self, message: int) -> bool:
        """The message's memory has not been given to another; asked after reading."""
        return self._counters[RECLAIMED] < message

    def is_gone(self) -> bool:
        """Its exporter has ended."""
        return not is_alive(self._pid)

    def done_with(self, message: int) -> None:
        self._counters[READ] = max(message, self._counters[READ])


def _pin(memory: torch.Tensor) -> None:
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error):
        raise SegmentRefused(f"shared memory cannot be pinned: CUDA error {int(error)}")
