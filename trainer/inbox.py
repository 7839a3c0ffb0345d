"""The trainer's end of the stream: messages in, samples out, and an account of what was lost on the way."""

import logging

import zmq

from sglang_specforge.contracts import spans
from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.sockets import lock_endpoint
from trainer.assemble import Assembler
from trainer.sample import Sample

logger = logging.getLogger(__name__)

# What does not fit stays with the exporter, whose ring is bounded in bytes; here only messages are counted.
_QUEUED_MESSAGES = 64


class Inbox:
    """Binds the endpoint that exporters connect to. ``ledger.streams`` tells what was received of each exporter.

    Raises:
        EndpointTaken: another process has bound it.
    """

    def __init__(self, endpoint: str, assembler: Assembler, ledger: TokenLedger) -> None:
        self.malformed = 0
        self._assembler, self._ledger = assembler, ledger
        self._lock = lock_endpoint(endpoint)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        self._socket.bind(endpoint)

    def receive(self, wait_s: float) -> list[Sample]:
        """Samples completed by everything that has arrived; waits up to ``wait_s`` for a first message."""
        samples = []
        timeout_ms = int(1000 * wait_s)
        while self._socket.poll(timeout_ms):
            samples += self._take(self._socket.recv_multipart(copy=False))
            timeout_ms = 0
        return samples

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._lock.close()

    def _take(self, frames: list[zmq.Frame]) -> list[Sample]:
        try:
            message, tensors = spans.decode([frame.buffer for frame in frames])
            self._account(message)
        except spans.WireError as error:
            self.malformed += 1
            logger.warning("draft training: a message was left out: %s", error)
            return []
        return self._assembler.add(message, tensors)

    def _account(self, message: spans.Message) -> None:
        """Tokens that earlier messages of this stream carried and that never came here are lost, and counted so."""
        lost = message.sent_before - self._ledger.streams.get(message.stream, 0)
        if lost < 0:
            raise spans.WireError(f"its tokens of stream {message.stream} have come before")
        self._ledger.drop("lost_in_transit", lost)
        self._ledger.streams[message.stream] = message.sent_before + message.tokens
