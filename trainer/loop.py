"""The trainer's main loop: take in what was captured, learn from it, publish what was learnt."""

import logging
import os
import signal
import time

import torch
import zmq

from sglang_specforge.contracts import control
from sglang_specforge.settings import Run
from sglang_specforge.versions import VersionFolder
from trainer.assemble import Assembler
from trainer.inbox import Inbox
from trainer.learner import Learner
from trainer.parity import ParityCheck
from trainer.replay import ReplayBuffer
from trainer.resume import Checkpoints

logger = logging.getLogger(__name__)

_WAIT_S = 0.2
_HEARTBEAT_EVERY_S = 1.0
_EVALUATED_SAMPLES = 16


class Trainer:
    """One process beside one server. Publishing also checkpoints, so that a published version can be gone on from."""

    def __init__(self, run: Run) -> None:
        self._run, settings = run, run.settings
        device = torch.device(settings.trainer_device)
        self._learner = Learner(run, device)
        self._checkpoints, self._versions = Checkpoints(run), VersionFolder(run.run_dir)
        progress = self._checkpoints.resume(self._learner)
        self._resumed_from_step = self._learner.step
        self._ledger = progress.ledger if progress else control.TokenLedger()
        self._ledger.drop("trainer_restarted", self._ledger.buffered)
        self._parity = ParityCheck(run, self._learner.target, progress.parity if progress else control.Parity())
        self._replay = ReplayBuffer(
            self._ledger, settings.replay_tokens, settings.holdout_every, settings.seed, settings.epochs_per_token
        )
        self._assembler = Assembler(self._ledger, settings.max_sample_tokens)
        self._inbox = Inbox(run.spans_endpoint, self._assembler, self._ledger)
        self._outbox = zmq.Context.instance().socket(zmq.PUSH)
        self._outbox.connect(run.control_endpoint)
        self._loss: float | None = None
        self._held_out_acceptance_length: float | None = None
        self._published_s = self._beat_s = time.monotonic()
        self._stopping = False
        self._parent_pid = os.getppid()

    def run(self) -> None:
        """Until ``stop``, or until the server is gone; then saves."""
        while not self._stopping and os.getppid() == self._parent_pid:
            can_train = self._replay.can_fill(self._run.settings.batch_tokens)
            self._take_in(wait_s=0 if can_train else _WAIT_S)
            if can_train:
                self._loss = self._learner.train(self._replay.draw(self._run.settings.batch_tokens))
                self._publish_if_due()
            self._beat_if_due("training" if can_train else "waiting")
        self._save()
        self._inbox.close()
        self._outbox.close(linger=0)

    def stop(self) -> None:
        self._stopping = True

    def _take_in(self, wait_s: float) -> None:
        for sample in self._inbox.receive(wait_s):
            if self._replay.add(sample):
                self._parity.compare(sample)
        self._assembler.expire()

    def _publish_if_due(self) -> None:
        if time.monotonic() - self._published_s < self._run.settings.publish_every_s:
            return
        self._held_out_acceptance_length = self._learner.acceptance_length(
            list(self._replay.held_out)[-_EVALUATED_SAMPLES:]
        )
        # A restarted trainer reads the configuration of the draft that the server started with.
        version = self._versions.publish(
            self._learner.config,
            self._learner.export(),
            keep=self._run.settings.keep_versions,
            spared=self._run.version_path(0),
        )
        self._save()
        self._send(control.VersionReady(version=version, step=self._learner.step))
        self._published_s = time.monotonic()
        logger.info(
            "draft training: published version %d at step %d, loss %.3f, held-out acceptance length %s",
            version, self._learner.step, self._loss, self._held_out_acceptance_length,
        )  # fmt: skip

    def _save(self) -> None:
        self._account()
        self._checkpoints.save(self._learner, self._ledger, self._parity.parity)

    def _account(self) -> None:
        self._ledger.buffered = self._assembler.open_tokens + self._replay.fresh_tokens

    def _beat_if_due(self, state: str) -> None:
        if time.monotonic() - self._beat_s < _HEARTBEAT_EVERY_S:
            return
        self._beat_s = time.monotonic()
        self._account()
        self._send(
            control.Heartbeat(
                pid=os.getpid(),
                state=state,
                step=self._learner.step,
                version=self._versions.newest() or 0,
                loss=self._loss,
                held_out_acceptance_length=self._held_out_acceptance_length,
                ledger=self._ledger,
                parity=self._parity.parity,
                malformed_messages=self._inbox.malformed,
                resumed_from_step=self._resumed_from_step,
            )
        )

    def _send(self, message: control.ControlMessage) -> None:
        try:
            self._outbox.send(control.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("draft training: the server takes no messages; this one is left out")


def main() -> None:
    """``python -m trainer``: train for the run that the environment describes, until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run = Run.inherited()
    if run is None:
        raise SystemExit(
            "error: no run to train for; a server started with --enable-draft-training starts its trainer itself"
        )
    torch.set_num_threads(run.settings.trainer_threads)
    torch.manual_seed(run.settings.seed)
    device = torch.device(run.settings.trainer_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP works on the current device
    # One process: a store in memory is enough, and nothing listens on a port.
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    trainer = Trainer(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: trainer.stop())
    try:
        trainer.run()
    finally:
        torch.distributed.destroy_process_group()
