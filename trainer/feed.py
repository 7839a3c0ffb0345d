"""One server as the trainer sees it: its stream, the account of what came by it, and the way back."""

import logging
from collections import deque
from collections.abc import Iterable

import torch
import zmq

from sglang_specforge.client import Unanswered
from sglang_specforge.contracts import control
from sglang_specforge.contracts.frames import Expected
from sglang_specforge.settings import OnlineSettings
from sglang_specforge.sockets import EndpointTaken
from trainer.assemble import Assembler
from trainer.far import Stream
from trainer.inbox import Inbox
from trainer.loss import FrozenTarget
from trainer.parity import ParityCheck
from trainer.prefix_store import PrefixStore
from trainer.replay import ReplayBuffer
from trainer.resume import StreamPosition

logger = logging.getLogger(__name__)


class Feed:
    """Reads the server's stream, alone, until it is closed.

    Args:
        stream: the server's; what its run says of versions holds for the numbers in it.
        known: accounts of earlier streams; the one of this server's life is gone on with.

    Raises:
        EndpointTaken: another trainer reads it.
        Unanswered: the server is on another machine and does not answer.
    """

    def __init__(
        self,
        stream: Stream,
        settings: OnlineSettings,
        target: FrozenTarget,
        prefixes: PrefixStore,
        known: Iterable[StreamPosition] = (),
    ) -> None:
        run = self.run = stream.run
        position = next((p for p in known if p.spans_endpoint == run.spans_endpoint), None) or StreamPosition(
            spans_endpoint=run.spans_endpoint, ledger=control.TokenLedger(), parity=control.Parity()
        )
        self.ledger = position.ledger
        self.ledger.drop("trainer_restarted", self.ledger.buffered)
        self._parity = ParityCheck(run, target, position.parity, stream.version_path)
        self._assembler = Assembler(
            self.ledger,
            settings.max_sample_tokens,
            prefixes,
            max_open_tokens=settings.replay_tokens,
            dtype=getattr(torch, run.served_dtype),
            prompts_only=run.disaggregation == "prefill",
        )
        vocab_size, hidden_size = target.embed_VH.shape
        expected = Expected(hidden_size, vocab_size, run.travel_dtype)
        self._far, self._door = stream.far, stream.far and stream.far.open_door()
        endpoint = self._far.spans_endpoint if self._far else run.spans_endpoint
        self._is_heard = True
        self._unsaid: deque[control.VersionReady] = deque()  # of versions that are on the server's machine
        try:
            puller = self._far and self._far.puller
            reads_into = (self._assembler, self.ledger, expected)
            self.inbox = Inbox(endpoint, *reads_into, self._door, puller, run.most_ring_bytes)
            self._outbox = stream.open_outbox(self._door)
            if self._far:
                self._far.lease()
        except (EndpointTaken, Unanswered):
            if self._door:
                self._door.close()
            raise

    def pass_on(self, replay: ReplayBuffer) -> None:
        """What has arrived, into the buffer; what is held out is compared with what the server proposed."""
        for sample in self.inbox.receive(0):
            if replay.add(sample, self.ledger):
                self._parity.compare(sample)
        self._assembler.expire()

    def position(self, replay: ReplayBuffer) -> StreamPosition:
        """The account as it is now."""
        self.ledger.buffered = self._assembler.open_tokens + replay.fresh_tokens(self.ledger)
        return StreamPosition(spans_endpoint=self.run.spans_endpoint, ledger=self.ledger, parity=self._parity.parity)

    def send(self, message: control.ControlMessage) -> None:
        """On its way to the server; a version goes ahead of the word of it where the server is on another machine."""
        if self._far and isinstance(message, control.VersionReady):
            self._far.bring(message)
            return
        self._unsaid += self._far.brought() if self._far else ()
        while self._unsaid and self._put(self._unsaid[0]):
            self._unsaid.popleft()
        self._put(message)

    def _put(self, message: control.ControlMessage) -> bool:
        try:
            self._outbox.send(control.encode(message), zmq.NOBLOCK)
            self._is_heard = True
        except zmq.Again:
            if self._is_heard:
                logger.warning("draft training: the server takes no messages; they are left out until it does")
            self._is_heard = False
        return self._is_heard

    def close(self) -> None:
        self.inbox.close()
        self._outbox.close(linger=0)
        if self._far:
            self._far.release()
            self._door.close()
