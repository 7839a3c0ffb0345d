"""States that a reader on another machine pulls out of the exporter's memory, by RDMA: the Mooncake transfer engine.

The segment is what it is between processes of one machine (``shared_memory.py``): the reader takes it up, reads, and
says what it is done with, here by reads and writes of the engine, in which the exporter's process takes no part. The
engine neither encrypts nor asks who reads or writes what was registered, so both sides have to be told to use it.
"""

import weakref

import numpy as np

from sglang_specforge.contracts.frames import WireError
from sglang_specforge.contracts.spans import RemoteSegment
from sglang_specforge.engine_address import Place
from sglang_specforge.shared_memory import HEADER_BYTES, READ, READER, RECLAIMED, SegmentRefused, SharedSegment


class Puller:
    """This process's transfer engine, at an ``EngineAddress``.

    Raises:
        SegmentRefused: Mooncake is not installed, or does not start there.
    """

    def __init__(self, address: str) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise SegmentRefused(
                f"{address}: the Mooncake transfer engine cannot be loaded ({error}); install "
                "mooncake-transfer-engine (and libibverbs1)"
            ) from error
        protocol, host, device = Place.of(address)
        self._engine = TransferEngine()
        if code := self._engine.initialize(host, "P2PHANDSHAKE", protocol, device):
            raise SegmentRefused(f"{address}: the Mooncake transfer engine does not start there (code {code})")
        self._session = f"{host}:{self._engine.get_rpc_port()}"

    def offer(self, segment: SharedSegment) -> RemoteSegment:
        """Where another engine finds the segment, for any reader. Raises SegmentRefused."""
        memory = segment.memory
        self.register(memory.data_ptr(), memory.nbytes)
        return RemoteSegment(self._session, memory.data_ptr(), memory.nbytes - HEADER_BYTES)

    def open(self, remote: RemoteSegment) -> "PulledSegment":
        """Raises SegmentRefused."""
        return PulledSegment(self, remote)

    def register(self, pointer: int, nbytes: int) -> None:
        if code := self._engine.register_memory(pointer, nbytes):
            raise SegmentRefused(f"{nbytes:,} bytes cannot be registered with the transfer engine (code {code})")

    def unregister(self, pointer: int) -> None:
        self._engine.unregister_memory(pointer)

    def read(self, session: str, here: int, there: int, nbytes: int) -> bool:
        """Whether it was read."""
        return self._engine.transfer_sync_read(session, here, there, nbytes) == 0

    def write(self, session: str, here: int, there: int, nbytes: int) -> bool:
        """Whether it was written."""
        return self._engine.transfer_sync_write(session, here, there, nbytes) == 0


class PulledSegment:
    """The reader's end, as ``shared_memory.OpenSegment`` is on the same machine.

    Raises:
        SegmentRefused: it cannot be reached.
    """

    def __init__(self, puller: Puller, remote: RemoteSegment) -> None:
        self._puller, self._remote, self._read = puller, remote, 0
        self.nbytes = remote.nbytes
        # The same bytes at the same places. Pages that nothing was pulled into take no memory, unless for RDMA.
        self._bytes = np.empty(HEADER_BYTES + remote.nbytes, np.uint8)
        self._counters = self._bytes[:HEADER_BYTES].view(np.int64)
        self._pointer = self._bytes.ctypes.data
        puller.register(self._pointer, self._bytes.nbytes)
        weakref.finalize(self, puller.unregister, self._pointer)
        if not self._put(READER, remote.reader):
            raise SegmentRefused(f"the memory of {remote.session} cannot be written to")

    @property
    def ring(self) -> "PulledSegment":
        return self

    def __getitem__(self, part: slice) -> memoryview:
        """A part of the ring, pulled here. Raises WireError."""
        begin, end = part.start + HEADER_BYTES, part.stop + HEADER_BYTES
        if not self._get(begin, end - begin):
            raise WireError(f"{end - begin} bytes cannot be pulled from {self._remote.session}")
        return memoryview(self._bytes)[begin:end]

    def is_intact(self, message: int) -> bool:
        """The message's memory has not been given to another; asked after reading."""
        return self._get(8 * RECLAIMED, 8) and int(self._counters[RECLAIMED]) < message

    def is_gone(self) -> bool:
        return False  # for as long as its stream is read

    def done_with(self, message: int) -> None:
        self._read = max(message, self._read)
        self._put(READ, self._read)

    def _get(self, offset: int, nbytes: int) -> bool:
        return self._puller.read(self._remote.session, self._pointer + offset, self._remote.base + offset, nbytes)

    def _put(self, counter: int, value: int) -> bool:
        self._counters[counter] = value
        offset = 8 * counter
        return self._puller.write(self._remote.session, self._pointer + offset, self._remote.base + offset, 8)
