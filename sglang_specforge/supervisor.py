"""Keeps one trainer process alive beside the server, without ever depending on it."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any

from sglang_specforge.settings import SERVER_PID_VARIABLE, Run

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0
_POLL_S = 0.5
_STABLE_S = 60.0  # a trainer that lived so long starts over with the first backoff
_SAVE_LIMIT_S = 10.0


class TrainerSupervisor:
    """Spawns ``python -m trainer`` and restarts it with a growing pause."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._process: subprocess.Popen | None = None
        self._restarts = 0
        self._last_exit: str | None = None
        self._ending = False

    async def keep_alive(self) -> None:
        """Runs until cancelled, when the trainer is told to save and end, or until ``end``."""
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                started = time.monotonic()
                self._process = self._spawn()
                # Polled: a thread that waits for a trainer that hangs would keep the server from ending.
                while (code := self._process.poll()) is None:
                    await asyncio.sleep(_POLL_S)
                if self._ending:
                    return
                self._last_exit = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                if time.monotonic() - started > _STABLE_S:
                    backoff_s = _FIRST_BACKOFF_S
                logger.warning("draft training: trainer ended (%s), next start in %.0f s", self._last_exit, backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
                self._restarts += 1
        finally:
            self.stop()

    def end(self) -> None:
        """Of a server that has nothing else to do any more: blocks until the trainer has saved, within a limit."""
        self._ending = True
        self.stop()
        try:
            if self._process is not None:
                self._process.wait(_SAVE_LIMIT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "draft training: the trainer has not ended within %.0f s; what it learnt since its last checkpoint is "
                "lost",
                _SAVE_LIMIT_S,
            )

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)  # a stopped process would not see the request to end

    def status(self) -> dict[str, Any]:
        alive = self._process is not None and self._process.poll() is None
        return {
            "alive": alive,
            "pid": self._process.pid if alive else None,
            "device": self._run.settings.trainer_device,
            "restarts": self._restarts,
            "last_exit": self._last_exit,
        }

    def _spawn(self) -> subprocess.Popen:
        self._run.run_dir.mkdir(parents=True, exist_ok=True)
        settings = self._run.settings
        threads = str(settings.trainer_threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": "lo",  # several processes speak over loopback
            SERVER_PID_VARIABLE: str(os.getpid()),
        }
        launcher = []
        if settings.trainer_processes > 1:
            launcher = [
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(settings.trainer_processes),
                "-m",
            ]
        with (self._run.run_dir / "trainer.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "trainer"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + settings.trainer_niceness
            os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
        except OSError as error:
            logger.warning("draft training: the trainer keeps the server's own priority (%s)", error)
        return process
