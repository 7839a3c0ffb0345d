"""The trainer's end of the stream: messages in, samples out, and an account of what was lost on the way."""

import logging
from collections.abc import Sequence
from functools import partial

import zmq

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import FRAMES, Expected, Ring, WireError, decode
from sglang_specforge.contracts.spans import Captured, Message, RemoteSegment, SegmentAddress
from sglang_specforge.curve import Door
from sglang_specforge.pull import PulledSegment, Puller
from sglang_specforge.shared_memory import OpenSegment, SegmentRefused
from sglang_specforge.sockets import lock_endpoint
from trainer.assemble import Assembler
from trainer.sample import Sample

logger = logging.getLogger(__name__)

# What does not fit stays with the exporter, whose ring is bounded in bytes; here only messages are counted.
_QUEUED_MESSAGES = 64
_MOST_STREAMS = 4096  # lives of exporters
_MOST_FRAME_BYTES = 64 << 20  # states come in pieces of 8 MiB; a header holds the tokens of cached prefixes
_MOST_AT_ONCE = 1024  # messages, before the caller gets to do something else


class Inbox:
    """Binds the endpoint that exporters connect to. ``ledger.streams`` tells what was received of each exporter.

    Args:
        expected: the target whose states are taken (None: any); anything else is counted as malformed.
        door: whom to let in, for an endpoint that other machines reach.
        puller: pulls states from them where they offer it, out of rings of at most ``max_ring_bytes``.

    Raises:
        EndpointTaken: another process has bound it.
    """

    def __init__(
        self,
        endpoint: str,
        assembler: Assembler,
        ledger: TokenLedger,
        expected: Expected | None = None,
        door: Door | None = None,
        puller: Puller | None = None,
        max_ring_bytes: int = 1 << 30,
    ) -> None:
        self.malformed = 0
        self._assembler, self._ledger, self._expected = assembler, ledger, expected
        self._offers: dict[str, SegmentAddress | RemoteSegment] = {}  # by stream, the last one
        self._segments: dict[str, OpenSegment | PulledSegment] = {}
        self._unshared = False
        self._is_far, self._puller, self._max_ring_bytes = door is not None, puller, max_ring_bytes
        self._lock = None if door else lock_endpoint(endpoint)
        self._context = door.context if door else zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MOST_FRAME_BYTES)  # a peer that sends a longer one is disconnected
        if door:
            door.bind(self._socket, endpoint)
        else:
            self._socket.bind(endpoint)
        self.endpoint = self._socket.last_endpoint.decode()  # with the port that was found, where any would do

    def receive(self, wait_s: float) -> list[Sample]:
        """Samples completed by what has arrived (if it never ends, by a part of it); waits up to ``wait_s`` for a first
        message."""
        samples = []
        wait_for_any([self], wait_s)
        for _ in range(_MOST_AT_ONCE):
            try:
                frames = self._receive_frames()
            except zmq.Again:  # also where the socket said that it has something
                self._let_go()
                break
            samples += self.take(frames)
        return samples

    def close(self) -> None:
        self._socket.close(linger=0)
        if self._lock is not None:  # a door is closed by who opened it
            self._context.term()
            self._lock.close()

    def take(self, frames: Sequence[memoryview]) -> list[Sample]:
        """Samples completed by one message; one that cannot be used is counted and left out."""
        try:
            message, tensors = decode(frames, self._expected, self._ring_of)
            self._account(message)
        except WireError as error:
            self.malformed += 1
            if self.malformed.bit_count() == 1:  # the first, and then ever fewer: rubbish must not fill the log
                logger.warning("draft training: %d messages left out, the last one: %s", self.malformed, error)
            return []
        if not isinstance(message, Captured):
            return self._assembler.add(message, tensors)
        if message.shared is None:
            self._open(message)
            return self._assembler.add(message, tensors)
        segment, number = self._segments[message.stream], message.shared.message
        samples = self._assembler.add(message, tensors, partial(segment.is_intact, number))
        segment.done_with(number)
        return samples

    def _ring_of(self, stream: str) -> Ring | None:
        segment = self._segments.get(stream)
        return segment and segment.ring

    def _open(self, message: Captured) -> None:
        """The exporter's memory, where it can be opened; states are in it from then on."""
        stream, offered = message.stream, message.pullable if self._is_far else message.offered
        if offered is None or self._offers.get(stream) == offered or (self._is_far and self._puller is None):
            return
        self._offers[stream] = offered
        try:
            self._segments[stream] = self._pull(offered) if self._is_far else OpenSegment(offered)
        except SegmentRefused as error:
            if not self._unshared:
                logger.warning("draft training: states come through sockets, not out of the server's memory: %s", error)
            self._unshared = True

    def _pull(self, remote: RemoteSegment) -> PulledSegment:
        if remote.nbytes > self._max_ring_bytes:
            raise SegmentRefused(f"a ring of {remote.nbytes:,} bytes, where at most {self._max_ring_bytes:,} may come")
        return self._puller.open(remote)

    def _let_go(self) -> None:
        """Of memory whose exporter is gone; all that it sent has been read."""
        for stream in [s for s, segment in self._segments.items() if segment.is_gone()]:
            del self._segments[stream]

    def _receive_frames(self) -> list[memoryview]:
        """The next message's frames; of those that are too many, none but one is kept. Raises zmq.Again."""
        frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
        while frames[-1].more:
            frames[FRAMES:] = [self._socket.recv(copy=False)]
        return [frame.buffer for frame in frames]

    def _account(self, message: Message) -> None:
        """Tokens that earlier messages of this stream carried and that never came here are lost, and counted so."""
        if message.stream not in self._ledger.streams and len(self._ledger.streams) >= _MOST_STREAMS:
            raise WireError(f"stream {message.stream} is one more than the {_MOST_STREAMS} that are kept apart")
        lost = message.sent_before - self._ledger.streams.get(message.stream, 0)
        if lost < 0:
            raise WireError(f"its tokens of stream {message.stream} have come before")
        self._ledger.drop("lost_in_transit", lost)
        self._ledger.streams[message.stream] = message.sent_before + message.tokens


def wait_for_any(inboxes: Sequence[Inbox], wait_s: float) -> None:
    """Until one has a message, for up to ``wait_s``."""
    poller = zmq.Poller()
    for inbox in inboxes:
        poller.register(inbox._socket, zmq.POLLIN)
    poller.poll(int(1000 * wait_s))
