"""Training on what a live server computes: samples from its stream, versions and heartbeats back to it."""

import logging
import os
import time

import torch.distributed as dist
import zmq

from sglang_specforge.contracts import control
from sglang_specforge.contracts.frames import Expected
from sglang_specforge.settings import SERVER_PID_VARIABLE, Run
from sglang_specforge.sockets import is_alive
from sglang_specforge.versions import VersionFolder
from trainer.assemble import Assembler
from trainer.evaluate import Simulated
from trainer.inbox import Inbox
from trainer.learner import Learner, Trained
from trainer.parity import ParityCheck
from trainer.prefix_store import PrefixStore
from trainer.replay import ReplayBuffer
from trainer.resume import OnlinePosition, Position
from trainer.sample import Sample
from trainer.share import share_out
from trainer.trackers import Trackers

logger = logging.getLogger(__name__)

_WAIT_S = 0.2
_HEARTBEAT_EVERY_S = 1.0
_EVALUATED_SAMPLES = 16
_LEAST_FRAME_MB = 64  # a header holds the tokens of cached prefixes, whatever the ring


class OnlineSource:
    """The first process holds the stream and the buffer, and deals each step's samples to the others."""

    def __init__(self, run: Run, learner: Learner, position: Position | None, trackers: Trackers | None) -> None:
        self._run, self._settings, self._trackers = run, run.settings, trackers
        self._resumed_from_step = learner.step
        self._last: Trained | None = None
        self._held_out_acceptance_length: float | None = None
        self._published_s = self._beat_s = time.monotonic()
        self._parent_pid = os.getppid()
        self._first = dist.get_rank() == 0
        if self._first:
            self._open(learner, position)

    def _open(self, learner: Learner, position: Position | None) -> None:
        settings = self._settings
        same = isinstance(position, OnlinePosition) and position.spans_endpoint == self._run.spans_endpoint
        self._ledger = position.ledger if same else control.TokenLedger()
        self._ledger.drop("trainer_restarted", self._ledger.buffered)
        parity = position.parity if same else control.Parity()
        self._parity = ParityCheck(self._run, learner.target, parity)
        self._replay = ReplayBuffer(
            self._ledger,
            settings.replay_tokens,
            settings.holdout_every,
            settings.seed,
            settings.epochs_per_token,
            settings.replay_policy,
            settings.slice_weights,
        )
        self._prefixes = PrefixStore(self._run.target_fingerprint, settings.prefix_store_mb << 20)
        self._assembler = Assembler(
            self._ledger, settings.max_sample_tokens, self._prefixes, max_open_tokens=settings.replay_tokens
        )
        vocab_size, hidden_size = learner.target.embed_VH.shape
        expected = Expected(hidden_size, vocab_size, self._run.served_dtype)
        max_frame_bytes = max(settings.ring_mb, _LEAST_FRAME_MB) << 20
        self._inbox = Inbox(self._run.spans_endpoint, self._assembler, self._ledger, expected, max_frame_bytes)
        self._outbox = zmq.Context.instance().socket(zmq.PUSH)
        self._outbox.connect(self._run.control_endpoint)

    def draw(self) -> list[list[Sample]] | None:
        """Waits a moment where there is not enough for a step."""
        batch: list[Sample] | None = None
        if self._first:
            can_train = self._replay.can_fill(self._settings.batch_tokens)
            for sample in self._inbox.receive(0 if can_train else _WAIT_S):
                if self._replay.add(sample):
                    self._parity.compare(sample)
            self._assembler.expire()
            if can_train:
                batch = self._replay.draw(self._settings.batch_tokens)
        return share_out(batch, self._settings.micro_batch_tokens)

    def held_out(self) -> list[list[Sample]]:
        newest = self._replay.held_out[-_EVALUATED_SAMPLES:] if self._first else None
        return share_out(newest, pass_tokens=1) or []

    def is_finished(self) -> bool:
        """The server is gone, or what launched this process for it."""
        return os.getppid() != self._parent_pid or not is_alive(int(os.environ[SERVER_PID_VARIABLE]))

    def wants_version(self, step: int) -> bool:
        return time.monotonic() - self._published_s >= self._settings.publish_every_s

    def position(self) -> Position:
        if not self._first:
            return OnlinePosition(spans_endpoint="", ledger=control.TokenLedger(), parity=control.Parity())
        self._account()
        return OnlinePosition(spans_endpoint=self._run.spans_endpoint, ledger=self._ledger, parity=self._parity.parity)

    def trained(self, result: Trained) -> None:
        self._last = result
        self._trackers.log(result)

    def published(self, version: int, step: int, simulated: Simulated, slices: dict[str, Simulated]) -> None:
        self._held_out_acceptance_length = simulated.length
        self._trackers.log_version(version, step, simulated, slices)
        self._send(control.VersionReady(version=version, step=step))
        self._published_s = time.monotonic()

    def beat(self, learning: bool) -> None:
        """Tell the server, about once a second, what the trainer is doing."""
        if time.monotonic() - self._beat_s < _HEARTBEAT_EVERY_S:
            return
        self._beat_s = time.monotonic()
        self._account()
        self._send(
            control.Heartbeat(
                pid=os.getpid(),
                state="training" if learning else "waiting",
                step=self._last.step if self._last else self._resumed_from_step,
                version=VersionFolder(self._run.run_dir).newest() or 0,
                loss=self._last.loss if self._last else None,
                held_out_acceptance_length=self._held_out_acceptance_length,
                ledger=self._ledger,
                parity=self._parity.parity,
                prefixes=self._prefixes.counts,
                staleness=self._replay.staleness,
                malformed_messages=self._inbox.malformed,
                resumed_from_step=self._resumed_from_step,
            )
        )

    def close(self) -> None:
        if self._first:
            self._inbox.close()
            self._outbox.close(linger=0)
            self._trackers.close()

    def _account(self) -> None:
        self._ledger.buffered = self._assembler.open_tokens + self._replay.fresh_tokens

    def _send(self, message: control.ControlMessage) -> None:
        try:
            self._outbox.send(control.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("draft training: the server takes no messages; this one is left out")
