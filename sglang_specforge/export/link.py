"""The exporter thread's end of the stream: whoever reads it, through shared memory where both can, else through ZMQ.

A reader on this machine listens at the run's own endpoint, one on another machine where it said. States lie in the
ring. A reader that has opened the ring's segment (or, on another machine, pulls from it: ``pull.py``) is told where,
and tells when it is done; any other gets them as frames, whose memory ZMQ gives back. A region is the ring's again when
its reader is done or gone.
"""

import secrets
from collections import deque
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_specforge import curve
from sglang_specforge.contracts.spans import Captured, Message, Shared, encode_header
from sglang_specforge.export.pieces import cut
from sglang_specforge.export.ring import HostRing, Region
from sglang_specforge.pull import Puller
from sglang_specforge.reader import Way


class _InFlight(NamedTuple):
    region: Region
    tracker: Any  # ZMQ's, of frames
    message: int  # its number in shared memory, or 0
    tokens: int


class Link:
    """Used by one thread. Sends nothing while nobody reads, and never waits."""

    def __init__(self, endpoint: str, ring: HostRing, puller: Puller | None = None) -> None:
        self._endpoint, self._ring, self._segment = endpoint, ring, ring.segment
        self._puller = puller  # its engine ends with it
        self._pullable = puller.offer(ring.segment) if puller and ring.segment else None
        self._context = zmq.Context()
        self._in_flight: deque[_InFlight] = deque()
        self._message = 0  # the last one in shared memory
        self._open(None)

    def turn_to(self, way: Way | None) -> None:
        """Send to a reader on another machine from here on, or to one on this machine. What the last one had not read
        is nobody's."""
        self._close_socket()
        self._forget_reader()
        self._open(way)

    def is_read(self) -> bool:
        self._look_for_partings()
        return bool(self._socket.get(zmq.EVENTS) & zmq.POLLOUT)

    def send(self, message: Message) -> bool:
        """Whether somebody reads it."""
        return self._send_copied([encode_header(message)])

    def send_states(self, message: Captured, tensors: list[torch.Tensor], region: Region) -> int:
        """Send a message whose first ``tensors`` lie in ``region``, end to end, and the last one elsewhere.

        How many of its tokens went to a reader; the region is released when the reader is done, or now if there is
        none.
        """
        self._look_for_partings()
        sent = (self._say_where if self._is_shared() else self._send_frames)(message, tensors, region)
        if sent is None:
            self._ring.release(region)
            return 0
        self._in_flight.append(sent)
        return sent.tokens

    def release_read(self) -> None:
        """Give back the memory of what has been read."""
        while self._in_flight and self._is_done(self._in_flight[0]):
            self._ring.release(self._in_flight.popleft().region)

    def status(self) -> dict[str, Any]:
        if (way := self._way) is not None and not self._is_shared():
            why = self._ring.unshared or f"its reader listens at {way.endpoint}"
            return {"transport": "tcp", "why_not_shared": why}
        return {
            "transport": ("mooncake" if way else "shared_memory") if self._is_shared() else "zmq",
            "why_not_shared": self._ring.unshared or None,
        }

    def close(self) -> None:
        self._close_socket()
        self._context.term()

    def _open(self, way: Way | None) -> None:
        self._way, self._reader = way, _new_reader()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a reader that is not there
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the ring bounds the bytes, as long as none are copied out of it
        self._socket.copy_threshold = 0
        self._socket.setsockopt(zmq.LINGER, 0)
        self._events = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        if way is None:
            self._socket.connect(self._endpoint)
        else:
            curve.connect(self._socket, way.endpoint, way.own, way.peer)

    def _close_socket(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
        self._socket.close()

    def _is_shared(self) -> bool:
        can_be = self._segment is not None and (self._way is None or self._pullable is not None)
        return can_be and self._segment.is_read_by(self._reader)

    def _is_done(self, sent: _InFlight) -> bool:
        return sent.message <= self._segment.read if sent.message else sent.tracker.done

    def _look_for_partings(self) -> None:
        """What a reader that is gone had not read is nobody's. One that comes is told the segment anew, so that none
        can speak for another."""
        while self._events.get(zmq.EVENTS) & zmq.POLLIN:
            recv_monitor_message(self._events)
            self._forget_reader()

    def _forget_reader(self) -> None:
        if self._segment is None:
            return
        self._segment.reclaim(self._message)
        self._reader = _new_reader()
        for sent in self._in_flight:
            if sent.message:
                self._ring.release(sent.region)
        self._in_flight = deque(sent for sent in self._in_flight if not sent.message)

    def _say_where(self, message: Captured, tensors: list[torch.Tensor], region: Region) -> _InFlight | None:
        *states, tokens_N = tensors
        ends = accumulate((tensor.nbytes for tensor in states), initial=region.offset)
        shared = Shared(self._message + 1, list(ends)[:-1])
        if not self._send_copied([encode_header(msgspec.structs.replace(message, shared=shared)), tokens_N.numpy()]):
            return None
        self._message += 1
        return _InFlight(region, None, self._message, message.tokens)

    def _send_frames(self, message: Captured, tensors: list[torch.Tensor], region: Region) -> _InFlight | None:
        if self._way is not None and self._pullable is not None:
            remote = msgspec.structs.replace(self._pullable, reader=self._reader)
            message = msgspec.structs.replace(message, pullable=remote)
        elif self._way is None and self._segment is not None:
            message = msgspec.structs.replace(message, offered=self._segment.address(self._reader))
        trackers, tokens = [], 0
        for piece, parts in cut(message, tensors):
            frames = [encode_header(piece), *map(_memory, parts)]
            try:
                trackers.append(self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False, track=True))
            except zmq.Again:
                break
            tokens += piece.tokens
        return _InFlight(region, zmq.MessageTracker(*trackers), 0, tokens) if trackers else None

    def _send_copied(self, frames: list[Any]) -> bool:
        """Small ones: cheaper to copy than to keep track of."""
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


def _new_reader() -> int:
    return secrets.randbits(62) + 1  # not from a generator that the server seeds, again and again with the same number


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
