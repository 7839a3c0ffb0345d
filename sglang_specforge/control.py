"""The server's control service: hears the trainer, has versions swapped and compared, and answers for the status.

It runs as tasks of the HTTP server's event loop, so nothing here may block; the schedulers do the loading and
copying themselves (``draft_bank``).
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang_specforge import curve
from sglang_specforge.ab.experiment import Experiments
from sglang_specforge.ab.part import Part
from sglang_specforge.ab.windows import Windows
from sglang_specforge.checkpoint import CheckpointError, noted_content
from sglang_specforge.contracts import control
from sglang_specforge.drafting import Governor
from sglang_specforge.drift import ALL
from sglang_specforge.export.acceptance import summary
from sglang_specforge.metrics import Metrics
from sglang_specforge.reader import Lease, Reader, ReaderHeld
from sglang_specforge.settings import Run
from sglang_specforge.supervisor import TrainerSupervisor
from sglang_specforge.swaps import (
    TRAINER,
    DraftHeld,
    Engine,
    NotAttached,
    Overtaken,
    SwapRefused,
    Swaps,
    UnknownVersion,
)
from sglang_specforge.watch import Watch, by_prompt, by_slice, by_version

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
_VERDICTS = 256  # that are remembered
_SILENT_S = 10.0  # a trainer not heard of for so long is shown as lagging
_NOBODY = ("not attached", "silent")  # states of the trainer


class ControlService:
    """One per server."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self.swaps = Swaps(run, engine)
        windows = Windows(self.swaps)
        self.experiments, self.part = Experiments(self.swaps, windows, run.run_dir / "ab"), Part(self.swaps, windows)
        self.drafting = Governor(self.swaps, engine, fixed=run.settings.drafting == "always")
        self._run, self._engine = run, engine
        self._supervisor = TrainerSupervisor(run) if run.settings.trainer == "spawn" else None
        self._heartbeat = control.Heartbeat()
        self._heard_at: float | None = None
        self._announced: asyncio.Queue[control.VersionReady] = asyncio.Queue()
        self._watch, self.metrics = Watch(self.swaps), Metrics(self._last_status)
        self._last_ranks: list[dict[str, Any]] | None = None  # as they were looked at last
        self._verdicts: dict[int, control.Verdict] = {}
        self._unreadable = 0
        self._lease, self._leases, self._leasing = Lease(run.way_file), 0, asyncio.Lock()
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PULL)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._take_announced())
                tasks.create_task(self._look())
                tasks.create_task(self.drafting.run(self._promised))
                if self._supervisor is not None:
                    tasks.create_task(self._supervisor.keep_alive())
        finally:
            self.experiments.abandon()
            self._inbox.close(linger=0)
            self._context.term()

    def end(self) -> None:
        """Of a server that is ending: blocks while its own trainer saves."""
        if self._supervisor is not None:
            self._supervisor.end()

    async def switch_capture(self, enabled: bool) -> None:
        """Have every exporter capture, or pause."""
        await self._engine.set_state(draft_training_capture=int(enabled))

    async def lease(self, reader: Reader) -> None:
        """Have the streams sent to a reader on another machine, for ``LEASE_S`` from now.

        Raises:
            ReaderHeld: somebody else reads them.
            NotAttached: the schedulers do not run the plugin.
        """
        async with self._leasing:
            if self._lease.reader is None:
                await self._check_unread()
            before = self._lease.reader
            if not self._lease.take(reader):
                return
            if before is not None:
                self._inbox.disconnect(before.control_endpoint)
            curve.connect(self._inbox, reader.control_endpoint, self._lease.own, reader.key)
            self._leases += 1
            await self._engine.set_state(draft_training_reader=self._leases)
            logger.info("draft training: states go to %s", reader.spans_endpoint)

    async def end_lease(self, key: str, why: str = "it has left") -> None:
        """Of the reader with this key; nothing happens where it has none."""
        async with self._leasing:
            reader = self._lease.reader
            if reader is None or reader.key != key:
                return
            self._lease.end()
            self._inbox.disconnect(reader.control_endpoint)
            self._heard_at = None
            await self._engine.set_state(draft_training_reader=0)
            logger.info("draft training: states go to %s no more: %s", reader.spans_endpoint, why)

    async def _check_unread(self) -> None:
        """Raises ReaderHeld where a trainer on this machine reads the streams."""
        if self._supervisor is not None:
            raise ReaderHeld(
                "this server has a trainer of its own; start it with --draft-training-trainer none to have it read "
                "from another machine"
            )
        closed = {rank["export"]["closed"] for rank in await self.swaps.ranks() if rank["export"]}
        if None in closed or ("paused" in closed and self._trainer_status()["state"] not in _NOBODY):
            raise ReaderHeld("a process on this server's machine reads its states; end that first")

    async def status(self) -> dict[str, Any]:
        """The answer of ``GET /draft/status``. Raises NotAttached."""
        return self._status_of(await self.swaps.ranks())

    def _last_status(self) -> dict[str, Any] | None:
        return None if self._last_ranks is None else self._status_of(self._last_ranks)

    def _status_of(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        exports = [rank["export"] for rank in ranks if rank["export"]]
        ledger = self._heartbeat.ledger
        captured, sent = (sum(export[key] for export in exports) for key in ("captured", "sent"))
        return {
            "target_fingerprint": self._run.target_fingerprint,
            "target_path": self._run.target_path,
            "served_dtype": self._run.served_dtype,
            "spans_endpoint": self._run.spans_endpoint,
            "draft": {
                **ranks[0]["bank"],
                "started_from": self._run.draft_path,
                "failed_swaps": {str(v): why for v, why in self.swaps.failed.items()},
                "gate": self.swaps.gate,
                "held_by": self.swaps.holder,
                "drafting": self.drafting.status(),
                **self._watch.status(),
            },
            "acceptance": summary(export["committed"] for export in exports),
            "acceptance_by_version": by_version(exports),
            "acceptance_by_slice": {name: found for name, found in by_slice(exports).items() if name != ALL},
            "acceptance_by_prompt_tokens": by_prompt(exports),
            "tokens": {
                "captured": captured,
                "trained": ledger.trained,
                "held_out": ledger.held_out,
                "buffered": ledger.buffered,
                "in_flight": sent - ledger.received,
                "dropped": _add_up([export["dropped"] for export in exports] + [ledger.dropped]),
            },
            "export": exports,
            "reader": {
                "key": self._lease.own.public,  # of the server
                "lease": self._lease.reader and self._lease.reader.model_dump(),
            },
            "trainer": self._trainer_status(),
        }

    async def versions(self) -> list[dict[str, Any]]:
        """The answer of ``GET /draft/versions``: every version of the run folder, oldest first. Raises NotAttached."""
        ranks = await self.swaps.ranks()
        acceptance = by_version([rank["export"] for rank in ranks if rank["export"]])
        bank, in_service = ranks[0]["bank"], {rank["bank"]["active_version"] for rank in ranks}
        return [
            {
                "version": version,
                "path": str(path := self.swaps.path(version)),
                "sha256": noted_content(path),
                "active": version in in_service,  # during an A/B, on replicas several are
                "resident": version in bank["resident_versions"],
                "refused": bank["refused"].get(str(version)) or self.swaps.failed.get(version),
                "verdict": msgspec.to_builtins(self._verdicts.get(version)),
                "acceptance": acceptance.get(str(version)),
            }
            for version in self.swaps.known_versions()
        ]

    def _trainer_status(self) -> dict[str, Any]:
        silent_s = None if self._heard_at is None else time.monotonic() - self._heard_at
        beat = msgspec.to_builtins(self._heartbeat)
        if silent_s is None and self._supervisor is None:
            beat["state"] = "not attached"
        elif silent_s is not None and silent_s > _SILENT_S:
            beat["state"] = "silent"
        process = self._supervisor.status() if self._supervisor else None
        return {**beat, "process": process, "silent_s": silent_s, "unreadable_messages": self._unreadable}

    async def _listen(self) -> None:
        self._inbox.bind(self._run.control_endpoint)
        while True:
            data = await self._inbox.recv()
            try:
                message = control.decode(data)
            except msgspec.MsgspecError as error:
                self._unreadable += 1
                if self._unreadable.bit_count() == 1:  # the first, and then ever fewer
                    logger.warning(
                        "draft training: %d control messages cannot be read, the last one: %s", self._unreadable, error
                    )
                continue
            if isinstance(message, control.VersionReady):
                self._announced.put_nowait(message)
            else:
                self._heartbeat, self._heard_at = message, time.monotonic()

    async def _take_announced(self) -> None:
        """What a trainer publishes goes live, or waits: for the gate, for a person, and in any case for the end of an
        A/B."""
        while True:
            announced = [await self._announced.get()]
            await self.swaps.is_free.wait()
            while not self._announced.empty():
                announced.append(self._announced.get_nowait())
            better = [ready for ready in announced if self._kept_out_by(ready.verdict) is None]
            newest = (better or announced)[-1]  # one is worth a swap
            try:
                await self._take(newest)
            except (CheckpointError, UnknownVersion, SwapRefused, DraftHeld, NotAttached) as error:
                logger.error("draft training: %s stays out: %s", newest.path, error)
            except Exception:  # the next one is heard of all the same
                logger.exception("draft training: %s stays out", newest.path)

    async def _take(self, ready: control.VersionReady) -> None:
        version = await self.swaps.add(Path(ready.path), TRAINER)
        verdict = ready.verdict
        if verdict is not None:
            self._verdicts[version] = verdict
            if len(self._verdicts) > _VERDICTS:
                del self._verdicts[min(self._verdicts)]
        if (why := self._kept_out_by(verdict)) is not None:
            event = "proposed" if self.swaps.gate == "propose" else "held_back"
            self.swaps.audit.write(event, "gate", version=version, why=why)
            return
        try:
            await self.swaps.activate(
                version, TRAINER, _told(verdict), if_still=lambda: self._kept_out_by(verdict) is None
            )
        except Overtaken:
            await self._take(ready)

    def _kept_out_by(self, verdict: control.Verdict | None) -> str | None:
        """Why a version does not go live by itself. One that somebody chose gives way only to what is better than it,
        not to what was judged before it was there."""
        gate, active = self.swaps.gate, self.swaps.active
        if gate == "off":
            return None
        if gate == "propose" or (verdict is not None and not verdict.passed):
            return _told(verdict)
        if self.swaps.is_chosen and (verdict is None or verdict.against != noted_content(self.swaps.path(active))):
            return f"not compared with version {active}, which is in service: {_told(verdict)}"
        return None

    def _promised(self) -> float | None:
        """What the trainer says of the version in service, where it is its newest one."""
        newest = self._heartbeat.version == self.swaps.active
        return self._heartbeat.held_out_acceptance_length if newest else None

    async def _look(self) -> None:
        """Live acceptance, every two seconds: for the guard, for drift, and for who scrapes metrics."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if self._lease.has_run_out():
                    await self.end_lease(self._lease.reader.key, "it has not been heard of")
                await self.part.end_if_left()
                ranks = await self.swaps.ranks()
                await self._watch.look(ranks, drafting=self.drafting.is_on)
                self._last_ranks = ranks
            except NotAttached:  # said where the status is asked for
                continue
            except Exception:  # it goes on looking
                logger.exception("draft training: live acceptance cannot be looked at")


@contextlib.asynccontextmanager
async def running(service: ControlService) -> Any:
    """Run the service beside the body; serving goes on if it breaks."""
    task = asyncio.create_task(service.run(), name="specforge-control")
    task.add_done_callback(_log_failure)
    try:
        yield service
    finally:
        service.end()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await task


def _log_failure(task: asyncio.Task) -> None:
    if not task.cancelled() and task.exception():
        logger.error("draft training: control service ended; serving goes on", exc_info=task.exception())


def _add_up(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for reason, tokens in count.items():
            total[reason] = total.get(reason, 0) + tokens
    return total


def _told(verdict: control.Verdict | None) -> str:
    return verdict.why if verdict else "not compared"
