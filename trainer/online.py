"""Training on what live servers compute: samples from their streams, versions and heartbeats back to them."""

import logging
import os
import time
from pathlib import Path
from typing import Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_specforge.client import Unanswered
from sglang_specforge.contracts import control
from sglang_specforge.manifest import Manifest
from sglang_specforge.settings import SERVER_PID_VARIABLE, OnlineSettings, Run
from sglang_specforge.sockets import EndpointTaken, is_alive
from sglang_specforge.target import reads_more_than_text
from sglang_specforge.training_settings import Job
from sglang_specforge.versions import VersionFolder
from trainer.evaluate import Evaluated
from trainer.far import Stream
from trainer.feed import Feed
from trainer.inbox import wait_for_any
from trainer.learner import Learner, Trained
from trainer.prefix_store import PrefixStore, block_bytes
from trainer.replay import ReplayBuffer
from trainer.resume import OnlinePosition, Position
from trainer.sample import Sample
from trainer.share import Dealer
from trainer.spill import Spill
from trainer.trackers import Trackers
from trainer.vocabulary import VocabularyWatch

logger = logging.getLogger(__name__)

_WAIT_S = 0.2
_HEARTBEAT_EVERY_S = 1.0
_REMEMBERED_STREAMS = 256


class Servers(Protocol):
    """Whose streams are trained on."""

    def streams(self) -> list[Stream]:
        """Of each server the newest life that is known; the first process asks, about once a second."""

    def are_gone(self) -> bool:
        """For good. Every process asks."""

    def served(self) -> Path | None:
        """Checkpoint of the draft in service; None where it is not here, or not the same at all of them."""

    def moved(self) -> dict[str, float]:
        """Slices ("": all) whose acceptance fell, and when, in seconds of the epoch."""


class OwnServer:
    """The one that started this trainer."""

    def __init__(self, run: Run) -> None:
        self._run, self._parent_pid = run, os.getppid()

    def streams(self) -> list[Stream]:
        return [Stream(self._run)]

    def are_gone(self) -> bool:
        """The server, or what launched this process for it."""
        return os.getppid() != self._parent_pid or not is_alive(int(os.environ[SERVER_PID_VARIABLE]))

    def served(self) -> Path | None:
        return self._run.version_path(self._manifest().active)

    def moved(self) -> dict[str, float]:
        return self._manifest().moved

    def _manifest(self) -> Manifest:
        return Manifest.load(VersionFolder(self._run.run_dir).root)


class OnlineSource:
    """The first process holds the streams and the buffer, and deals each step's samples to the others.

    Raises:
        EndpointTaken: another trainer reads the stream of a server that is there at the start.
        Unanswered: one on another machine does not answer.
    """

    def __init__(
        self,
        job: Job,
        settings: OnlineSettings,
        learner: Learner,
        servers: Servers,
        position: Position | None,
        trackers: Trackers | None,
    ) -> None:
        self._job, self._settings, self._servers, self._trackers = job, settings, servers, trackers
        self._target, self._resumed_from_step = learner.target, learner.step
        self._vocabulary = VocabularyWatch(settings.draft_vocab_gain)
        self._last: Trained | None = None
        self._held_out_acceptance_length: float | None = None
        self._published_s = self._beat_s = time.monotonic()
        self._feeds: dict[str, Feed] = {}  # by the endpoint of the stream
        self._known = {p.spans_endpoint: p for p in position.streams} if isinstance(position, OnlinePosition) else {}
        self._taken: set[str] = set()
        self._dealer = Dealer()
        self._first = dist.get_rank() == 0
        if not self._first:
            return
        best = self._versions.best()  # what an earlier life of this trainer had its servers use, as far as is known
        self._passed = (best and self._versions.number(best)) or 0
        self._replay = ReplayBuffer(
            settings.replay_tokens,
            settings.holdout_every,
            settings.seed,
            settings.epochs_per_token,
            settings.replay_policy,
            settings.slice_weights,
            settings.drift_weight,
        )
        self._prefixes = self._make_prefix_store()
        for stream in servers.streams():
            self._open(stream)

    def draw(self) -> list[list[Sample]] | None:
        """Waits a moment where there is not enough for a step."""
        batch: list[Sample] | None = None
        if self._first:
            can_train = self._replay.can_fill(self._settings.batch_tokens)
            wait_for_any([feed.inbox for feed in self._feeds.values()], 0 if can_train else _WAIT_S)
            for feed in self._feeds.values():
                feed.pass_on(self._replay)
            if can_train:
                batch = self._replay.draw(self._settings.batch_tokens)
        return self._dealer.share_out(batch, self._settings.micro_batch_tokens)

    def held_out(self) -> list[list[Sample]]:
        newest = self._replay.held_out[-self._settings.evaluated_samples :] if self._first else None
        return Dealer().share_out(newest, pass_tokens=1) or []

    def is_finished(self) -> bool:
        return self._servers.are_gone()

    def wants_version(self, step: int) -> bool:
        return time.monotonic() - self._published_s >= self._settings.publish_every_s

    def position(self) -> Position:
        """The accounts of all streams so far, as a server may only be out of reach for a while."""
        if self._first:
            self._known |= {endpoint: feed.position(self._replay) for endpoint, feed in self._feeds.items()}
        return OnlinePosition(streams=list(self._known.values())[-_REMEMBERED_STREAMS:])

    def trained(self, result: Trained) -> None:
        self._last = result
        self._trackers.log(result)

    def rival(self) -> Path | None:
        return self._servers.served() or self._job.version_path(self._passed)

    def published(self, version: int, step: int, evaluated: Evaluated) -> None:
        self._held_out_acceptance_length = evaluated.overall.length
        self._trackers.log_version(version, step, evaluated)
        if evaluated.verdict.passed:
            self._passed = version
        for feed in self._feeds.values():
            feed.send(self._version_ready(version, evaluated.verdict))
        self._published_s = time.monotonic()

    def better_vocabulary(self, t2d_V: Tensor) -> Tensor | None:
        counts_V = self._replay.count_tokens(t2d_V.numel(), self._settings.loss_on == "generated")
        return self._vocabulary.better(counts_V, t2d_V)

    def beat(self, learning: bool) -> None:
        """About once a second, look for servers that came or started anew, and tell all what the trainer is doing."""
        if time.monotonic() - self._beat_s < _HEARTBEAT_EVERY_S:
            return
        self._beat_s = time.monotonic()
        self._follow_servers()
        self._replay.follow(self._servers.moved())
        beat = control.Heartbeat(
            pid=os.getpid(),
            state="training" if learning else "waiting",
            step=self._last.step if self._last else self._resumed_from_step,
            version=self._versions.newest() or 0,
            loss=self._last.loss if self._last else None,
            skipped_steps=self._last.skipped_steps if self._last else 0,
            taken_up=self._last.taken_up if self._last else 0,
            held_out_acceptance_length=self._held_out_acceptance_length,
            prefixes=self._prefixes.counts,
            staleness=self._replay.staleness,
            vocabulary=self._vocabulary.seen,
            resumed_from_step=self._resumed_from_step,
        )
        for feed in self._feeds.values():
            own = feed.position(self._replay)
            malformed = feed.inbox.malformed
            feed.send(msgspec.structs.replace(beat, ledger=own.ledger, parity=own.parity, malformed_messages=malformed))

    def close(self) -> None:
        if self._first:
            for feed in self._feeds.values():
                feed.close()
            self._trackers.close()

    @property
    def _versions(self) -> VersionFolder:
        return VersionFolder(self._job.run_dir)

    def _follow_servers(self) -> None:
        streams = {stream.run.spans_endpoint: stream for stream in self._servers.streams()}
        for endpoint in self._feeds.keys() - streams.keys():  # an earlier life of a server
            feed = self._feeds.pop(endpoint)
            self._known[endpoint] = feed.position(self._replay)
            feed.close()
        for endpoint in streams.keys() - self._feeds.keys():
            try:
                self._open(streams[endpoint])
            except (EndpointTaken, Unanswered) as error:
                if endpoint not in self._taken:
                    logger.error("draft training: a server is not trained on, and tried again: %s", error)
                self._taken.add(endpoint)

    def _make_prefix_store(self) -> PrefixStore:
        settings, hidden_size = self._settings, self._target.embed_VH.shape[1]
        spill = None
        if settings.prefix_spill_dir:
            dtype, more = getattr(torch, self._job.served_dtype), reads_more_than_text(Path(self._job.target_path))
            slot_bytes = block_bytes(hidden_size, dtype, more)
            spill = Spill(settings.prefix_spill_dir, settings.prefix_spill_mb << 20, slot_bytes)
        return PrefixStore(self._job.target_fingerprint, settings.prefix_store_mb << 20, spill)

    def _open(self, stream: Stream) -> None:
        """Read the server's stream; one that has drafts of its own gets the newest that passed the gate here."""
        run = stream.run
        feed = Feed(stream, self._settings, self._target, self._prefixes, self._known.values())
        logger.info("draft training: reads %s", stream.far.spans_endpoint if stream.far else run.spans_endpoint)
        self._feeds[run.spans_endpoint] = feed
        if (stream.far or run.run_dir != self._job.run_dir) and self._passed:
            feed.send(self._version_ready(self._passed))

    def _version_ready(self, version: int, verdict: control.Verdict | None = None) -> control.VersionReady:
        return control.VersionReady(path=str(self._versions.path(version)), verdict=verdict)
