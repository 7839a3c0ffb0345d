"""The server's control service: hears the trainer, has versions staged and swapped, and answers for the status.

It runs as tasks of the HTTP server's event loop, so nothing here may block; the schedulers do the loading and
copying themselves (``draft_bank``).
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.contracts import control
from sglang_specforge.settings import Run
from sglang_specforge.supervisor import TrainerSupervisor
from sglang_specforge.versions import VersionFolder

logger = logging.getLogger(__name__)

_SWAP_POLL_S = 0.2  # each look costs the scheduler a copy of its configuration
_STAGE_LIMIT_S = 120.0
_SILENT_S = 10.0  # a trainer not heard of for so long is shown as lagging


class Engine(Protocol):
    """What the service asks of the serving engine; both reach every scheduler."""

    async def set_state(self, key: str, value: int) -> bool: ...
    async def get_states(self) -> list[dict[str, Any]]: ...


class ControlService:
    """One per server."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self._run, self._engine = run, engine
        self._versions = VersionFolder(run.run_dir)
        self._supervisor = TrainerSupervisor(run) if run.settings.trainer == "spawn" else None
        self._heartbeat = control.Heartbeat()
        self._heard_at: float | None = None
        self._announced: asyncio.Queue[Path] = asyncio.Queue()
        self._unreadable = 0
        self._failed_swaps: dict[int, str] = {}  # those that no rank refused; the banks keep their own
        self._swapping = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._swap_announced())
            if self._supervisor is not None:
                tasks.create_task(self._supervisor.keep_alive())

    async def swap_in(self, checkpoint: Path) -> int:
        """Make a checkpoint the next version and activate it; returns its number.

        Raises:
            CheckpointError: it cannot be read.
            SwapRefused: it does not fit the served target or draft; the active version stays.
        """
        version = await self._adopt(checkpoint)
        await self._swap(version)
        return version

    async def switch_capture(self, enabled: bool) -> None:
        """Have every exporter capture, or pause."""
        await self._engine.set_state("draft_training_capture", int(enabled))

    async def status(self) -> dict[str, Any]:
        """The answer of ``GET /draft/status``. Raises NotAttached."""
        ranks = await self._ranks()
        exports = [rank["export"] for rank in ranks if rank["export"]]
        by_version = [export["acceptance_by_version"] for export in exports]
        ledger = self._heartbeat.ledger
        captured, sent = (sum(export[key] for export in exports) for key in ("captured", "sent"))
        dropped = _add_up([export["dropped"] for export in exports] + [ledger.dropped])
        return {
            "target_fingerprint": self._run.target_fingerprint,
            "target_path": self._run.target_path,
            "served_dtype": self._run.served_dtype,
            "spans_endpoint": self._run.spans_endpoint,
            "draft": {
                **ranks[0]["bank"],
                "started_from": self._run.draft_path,
                "failed_swaps": {str(v): why for v, why in self._failed_swaps.items()},
            },
            "acceptance": _acceptance([export["acceptance"] for export in exports]),
            "acceptance_by_version": {
                version: _acceptance([export[version] for export in by_version if version in export])
                for version in sorted({v for export in by_version for v in export}, key=int)
            },
            "tokens": {
                "captured": captured,
                "trained": ledger.trained,
                "held_out": ledger.held_out,
                "buffered": ledger.buffered,
                "in_flight": sent - ledger.received,
                "dropped": dropped,
            },
            "export": exports,
            "trainer": self._trainer_status(),
        }

    async def _ranks(self) -> list[dict[str, Any]]:
        states = await self._engine.get_states()
        if not all("draft_training" in state for state in states):
            raise NotAttached("a scheduler runs without draft training: its plugin did not load; see the server's log")
        return [state["draft_training"] for state in states]

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
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PULL)
        socket.bind(self._run.control_endpoint)
        try:
            while True:
                data = await socket.recv()
                try:
                    message = control.decode(data)
                except msgspec.MsgspecError as error:
                    self._unreadable += 1
                    if self._unreadable.bit_count() == 1:  # the first, and then ever fewer
                        logger.warning(
                            "draft training: %d control messages cannot be read, the last one: %s",
                            self._unreadable, error,
                        )  # fmt: skip
                    continue
                if isinstance(message, control.VersionReady):
                    self._announced.put_nowait(Path(message.path))
                else:
                    self._heartbeat, self._heard_at = message, time.monotonic()
        finally:
            socket.close(linger=0)
            context.term()

    async def _swap_announced(self) -> None:
        while True:
            checkpoint = await self._announced.get()
            while not self._announced.empty():
                checkpoint = self._announced.get_nowait()  # only the newest is worth a swap
            try:
                await self._swap(self._versions.number(checkpoint) or await self._adopt(checkpoint))
            except (CheckpointError, SwapRefused, NotAttached) as error:
                logger.error("draft training: %s stays out: %s", checkpoint, error)

    async def _adopt(self, checkpoint: Path) -> int:
        """Copy a checkpoint in; of the older versions, the one that is active stays besides the newest."""
        active = (await self._ranks())[0]["bank"]["active_version"]
        return await asyncio.to_thread(
            self._versions.adopt, checkpoint, self._run.settings.keep_versions, [self._run.version_path(active)]
        )

    async def _swap(self, version: int) -> None:
        """One swap at a time. Raises SwapRefused; the active version stays."""
        async with self._swapping:
            try:
                await asyncio.wait_for(self._stage_and_activate(version), _STAGE_LIMIT_S)
            except TimeoutError as error:
                self._failed_swaps[version] = f"not staged on every rank within {_STAGE_LIMIT_S:.0f} s"
                raise SwapRefused(self._failed_swaps[version]) from error

    async def _stage_and_activate(self, version: int) -> None:
        """Have every rank load the version, then activate it on all of them in one scheduler iteration."""
        await self._engine.set_state("draft_training_stage", version)
        while True:
            await asyncio.sleep(_SWAP_POLL_S)
            banks = [rank["bank"] for rank in await self._ranks()]
            for bank in banks:
                if reason := bank["refused"].get(str(version)):
                    raise SwapRefused(reason)
            if not all(bank["staged_version"] == version for bank in banks):
                continue
            # One rank answers for its TP group; where another is still loading, all ranks decline alike.
            if await self._engine.set_state("draft_training_activate", version):
                return


class NotAttached(RuntimeError):
    """The schedulers do not run the plugin."""


class SwapRefused(RuntimeError):
    """A rank found the version unusable."""


@contextlib.asynccontextmanager
async def running(service: ControlService) -> Any:
    """Run the service beside the body; serving goes on if it breaks."""
    task = asyncio.create_task(service.run(), name="specforge-control")
    task.add_done_callback(_log_failure)
    try:
        yield service
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await task


def _log_failure(task: asyncio.Task) -> None:
    if not task.cancelled() and task.exception():
        logger.error("draft training: control service ended; serving goes on", exc_info=task.exception())


def _acceptance(counts: list[list[int]]) -> dict[str, float | None]:
    """Verify passes (one a request), the tokens they committed, and tokens a pass, over all exporters."""
    passes, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return {"passes": passes, "tokens": tokens, "length": tokens / passes if passes else None}


def _add_up(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for reason, tokens in count.items():
            total[reason] = total.get(reason, 0) + tokens
    return total
