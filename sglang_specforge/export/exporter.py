"""The thread that turns capture entries into messages and never waits for the trainer.

The scheduler thread asks ``admission`` and calls ``capture``, which only appends to a queue. Everything that may take
time (waiting for a copy, framing, sending) happens in this thread, without a lock held. It takes up several passes at a
time: whenever it runs Python, the scheduler thread does not.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_specforge.contracts.spans import Finished
from sglang_specforge.export.acceptance import Acceptance
from sglang_specforge.export.admission import Admission
from sglang_specforge.export.entry import Entry, Verified
from sglang_specforge.export.link import Link
from sglang_specforge.export.pace import Pace
from sglang_specforge.export.ring import HostRing
from sglang_specforge.pull import Puller
from sglang_specforge.reader import load_way

logger = logging.getLogger(__name__)

_TAKE_UP_EVERY_S = 0.02


class Exporter:
    """Owns the ring, the link to the reader and the counters of one exporting rank. A reader on this machine listens at
    ``endpoint``; ``way_file`` says where one on another does."""

    def __init__(
        self, endpoint: str, way_file: Path, ring: HostRing, admission: Admission, puller: Puller | None = None
    ) -> None:
        self.ring, self.admission = ring, admission
        self.stream = uuid.uuid4().hex
        self.pace = Pace()
        self.failure: str | None = None
        self.paused = False  # by the operator
        self.reader = 0  # number of the lease by which one on another machine reads; 0: one on this machine
        self._entries: deque[Entry] = deque()
        self._captured = self._sent = self._passes = 0
        self._scheduler_s = 0.0
        self._dropped: dict[str, int] = {}
        self._acceptance = Acceptance()
        self._unsent: deque[Finished] = deque()
        self._is_stopping, self._hurry = False, threading.Event()
        self._way_file, self._turned_to = way_file, 0
        self._link = Link(endpoint, ring, puller)
        self._thread = threading.Thread(target=self._run, name="specforge-exporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._hurry.set()
        self._thread.join(timeout=2)

    def capture(self, entry: Entry) -> None:
        """Take over an entry (scheduler thread)."""
        if self.failure is None:
            self._entries.append(entry)
            if self.ring.used_bytes > self.ring.capacity_bytes // 4:
                self._hurry.set()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what a pass costs the scheduler thread."""
        started_s = time.perf_counter()
        yield
        self._scheduler_s += time.perf_counter() - started_s
        self._passes += 1

    def fail(self, error: Exception) -> None:
        """Give up capturing, for good and visibly; serving goes on."""
        self.failure = f"{type(error).__name__}: {error}"
        logger.error("draft training: capture stopped; nothing is captured from here on", exc_info=error)

    def counters(self) -> dict[str, Any]:
        """Tokens captured = sent + dropped, once the queue is empty."""
        return {
            "stream": self.stream,
            "captured": self._captured,
            "sent": self._sent,
            "dropped": dict(self._dropped),
            "passes": self._passes,
            "scheduler_s": self._scheduler_s,  # taken from the scheduler thread by all these passes
            "queued_passes": len(self._entries),
            "ring_bytes": self.ring.capacity_bytes,
            "ring_used_bytes": self.ring.used_bytes,
            **self._link.status(),
            "failure": self.failure,
            **self.admission.status(),
            **self._acceptance.status(),
            "pace": self.pace.status(),
            "swap_steps": self.pace.swap_steps(),
        }

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._hurry.wait(_TAKE_UP_EVERY_S)
                self._hurry.clear()
                self._look_for_reader()
                ends = self._take_ends()
                self._send_entries()
                self._announce(ends)
                self._link.release_read()
        except Exception as error:  # the server must serve on; status and log say that capture stopped
            self.fail(error)
        finally:
            self._link.close()

    def _look_for_reader(self) -> None:
        if (reader := self.reader) != self._turned_to:
            self._turned_to = reader
            self.admission.closed = "nobody_listening"  # the last one's being there says nothing of this one's
            self._send_entries()  # to the last one, for whom they were captured
            self._turn_to(reader)
        closed = "paused" if self.paused else None if self._link.is_read() else "nobody_listening"
        if closed != self.admission.closed:
            logger.info("draft training: capturing %s", f"stops: {closed}" if closed else "begins")
            self.admission.closed = closed

    def _turn_to(self, reader: int) -> None:
        try:
            self._link.turn_to(load_way(self._way_file) if reader else None)
        except (OSError, msgspec.MsgspecError, zmq.ZMQError) as error:
            logger.error("draft training: states cannot be sent to the reader that asked for them: %s", error)
            self._link.turn_to(None)

    def _take_ends(self) -> list[Finished]:
        """Requests that were cut short or have ended; all their entries are in the queue already."""
        ends = [
            Finished(self.stream, 0, alias, 0, aborted=False, cut_short=True) for alias in _drain(self.admission.cut)
        ]
        for admitted in self.admission.take_ended():
            if admitted.left_out is None:
                aborted = admitted.aborted or admitted.request.is_aborted()
                ends.append(Finished(self.stream, 0, admitted.request.alias, admitted.request.total_tokens(), aborted))
        return ends

    def _send_entries(self) -> None:
        """Everything queued by now."""
        for entry in _drain(self._entries):
            self._send_entry(entry)

    def _send_entry(self, entry: Entry) -> None:
        entry.wait()
        if entry.verified is not None:
            self._count(entry.verified, entry.draft_version)
        if entry.region is None:
            return
        spans = entry.spans()
        message, tensors = entry.message(self.stream, self._sent, spans)
        self._captured += message.tokens
        if not spans:
            self.ring.release(entry.region)
            return
        sent = self._link.send_states(message, tensors, entry.region)
        self._sent += sent
        if unsent := message.tokens - sent:
            self._drop("nobody_listening", unsent)

    def _count(self, verified: Verified, version: int) -> None:
        committed = verified.committed()
        if verified.drafted:
            self._acceptance.count(
                version, committed, verified.slices, verified.prompts, verified.window, verified.standings
            )
        self.pace.count(version, verified.drafted, verified.batch_size, verified.seconds, committed)

    def _announce(self, ends: list[Finished]) -> None:
        self._unsent += ends
        while self._unsent:
            # An end that finds no reader waits here: it is small, and without it a sample would stay open.
            end = msgspec.structs.replace(self._unsent[0], sent_before=self._sent)
            if not self._link.send(end):
                break
            self._unsent.popleft()
        while len(self._unsent) > 65_536:
            self._unsent.popleft()  # the trainer closes such samples by age

    def _drop(self, reason: str, tokens: int) -> None:
        if reason not in self._dropped:
            logger.warning("draft training: captured tokens are being dropped (%s); serving is not affected", reason)
        self._dropped[reason] = self._dropped.get(reason, 0) + tokens


def _drain(queue: deque[Any]) -> list[Any]:
    return [queue.popleft() for _ in range(len(queue))]
