"""The thread that turns capture entries into messages and never waits for the trainer.

The scheduler thread calls ``capture`` and ``watch``, which only append to queues. Everything that may take
time (waiting for a copy, framing, sending) happens in this thread, without a lock held.
"""

import logging
import queue
import threading
import uuid
from collections import deque
from typing import Any, Protocol

import torch
import zmq

from sglang_specforge.contracts.spans import Finished, Message, encode_header
from sglang_specforge.export.entry import Entry
from sglang_specforge.export.ring import HostRing, Region

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_VERSIONS = 32  # whose acceptance is kept apart
_QUEUED_MESSAGES = 256  # ZMQ high-water mark; the ring bounds the bytes


class WatchedRequest(Protocol):
    """What the exporter reads of a request to learn that it ended."""

    rid: str

    def is_finished(self) -> bool: ...
    def is_aborted(self) -> bool: ...
    def total_tokens(self) -> int: ...


class Exporter:
    """Owns the ring, the socket and the counters of one exporting rank."""

    def __init__(self, endpoint: str, ring_bytes: int, pinned: bool) -> None:
        self.ring = HostRing(ring_bytes, pinned)
        self.stream = uuid.uuid4().hex
        self.failure: str | None = None
        self._entries: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        self._watched: dict[str, WatchedRequest] = {}
        self._captured = self._sent = 0
        self._dropped: dict[str, int] = {}
        self._acceptance = [0, 0]  # verifications of a request, tokens they committed
        self._acceptance_by_version: dict[int, list[int]] = {}  # the newest versions
        self._in_flight: deque[tuple[Any, Region]] = deque()  # message tracker, region it still reads
        self._unsent_ends: deque[tuple[str, int, bool]] = deque()
        self._stopping = threading.Event()
        self._endpoint = endpoint
        self._thread = threading.Thread(target=self._run, name="specforge-exporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=2)

    def capture(self, entry: Entry) -> None:
        """Take over an entry (scheduler thread)."""
        if self.failure is None:
            self._entries.put(entry)

    def fail(self, error: Exception) -> None:
        """Give up capturing, for good and visibly; serving goes on."""
        self.failure = f"{type(error).__name__}: {error}"
        logger.error("draft training: capture stopped; nothing is captured from here on", exc_info=error)

    def watch(self, request: WatchedRequest) -> None:
        """Announce the end of this request when it comes (scheduler thread)."""
        self._watched[request.rid] = request

    def counters(self) -> dict[str, Any]:
        """Tokens captured = sent + dropped, once the queue is empty."""
        return {
            "stream": self.stream,
            "captured": self._captured,
            "sent": self._sent,
            "dropped": dict(self._dropped),
            "queued_passes": self._entries.qsize(),
            "ring_used_bytes": self.ring.used_bytes,
            "failure": self.failure,
            "acceptance": self._acceptance,
            "acceptance_by_version": {str(v): counts for v, counts in list(self._acceptance_by_version.items())},
        }

    def _run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        try:
            while not self._stopping.is_set():
                # Requests seen as finished here have all their entries in the queue already.
                ended = [r for r in list(self._watched.values()) if r.is_finished()]
                self._send_entries(socket)
                self._announce_ends(socket, ended)
                self._release_sent()
        except Exception as error:  # the server must serve on; status and log say that capture stopped
            self.fail(error)
        finally:
            socket.close()
            context.term()

    def _send_entries(self, socket: zmq.Socket) -> None:
        """Everything queued by now; waits a moment for the first."""
        for i in range(max(1, self._entries.qsize())):
            try:
                entry = self._entries.get(timeout=_POLL_S if i == 0 else 0)
            except queue.Empty:
                return
            self._send_entry(socket, entry)

    def _send_entry(self, socket: zmq.Socket, entry: Entry) -> None:
        entry.wait()
        spans = entry.spans()
        message, tensors = entry.message(self.stream, self._sent, spans)
        self._captured += message.tokens
        if entry.verify is not None:
            self._count_acceptance(entry.draft_version, len(spans), message.tokens)
        if entry.region is None:
            self._drop("ring_full", message.tokens)
        elif not spans:
            self.ring.release(entry.region)
        elif (tracker := self._send(socket, message, tensors)) is None:
            self._drop("trainer_not_reading", message.tokens)
            self.ring.release(entry.region)
        else:
            self._sent += message.tokens
            self._in_flight.append((tracker, entry.region))

    def _count_acceptance(self, version: int, passes: int, tokens: int) -> None:
        for counts in (self._acceptance, self._acceptance_by_version.setdefault(version, [0, 0])):
            counts[0] += passes
            counts[1] += tokens
        if len(self._acceptance_by_version) > _VERSIONS:
            del self._acceptance_by_version[min(self._acceptance_by_version)]

    def _announce_ends(self, socket: zmq.Socket, ended: list[WatchedRequest]) -> None:
        for request in ended:
            del self._watched[request.rid]
            self._unsent_ends.append((request.rid, request.total_tokens(), request.is_aborted()))
        while self._unsent_ends:
            # An end that finds no room waits here: it is small, and without it a sample would stay open.
            if self._send(socket, Finished(self.stream, self._sent, *self._unsent_ends[0]), []) is None:
                break
            self._unsent_ends.popleft()
        while len(self._unsent_ends) > 65_536:
            self._unsent_ends.popleft()  # the trainer closes such samples by age

    def _send(self, socket: zmq.Socket, message: Message, tensors: list[torch.Tensor]) -> Any:
        """ZMQ's tracker of the message's memory, or None where the trainer takes nothing more."""
        frames = [encode_header(message), *(_memory(t) for t in tensors)]
        try:
            return socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            return None

    def _release_sent(self) -> None:
        while self._in_flight and self._in_flight[0][0].done:
            self.ring.release(self._in_flight.popleft()[1])

    def _drop(self, reason: str, tokens: int) -> None:
        if reason not in self._dropped:
            logger.warning("draft training: captured tokens are being dropped (%s); serving is not affected", reason)
        self._dropped[reason] = self._dropped.get(reason, 0) + tokens


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
