"""A real SGLang server as a child process: started, waited for, and gone with everything it started."""

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

# Of every server that is started here, where a machine needs it: the device, if nobody says one, and flags, which win.
DEVICE_VARIABLE, FLAGS_VARIABLE = "SPECFORGE_SERVER_DEVICE", "SPECFORGE_SERVER_FLAGS"
_READY_LIMIT_S, _READY_LIMIT_OF_A_GPU_S = 240.0, 600.0  # where kernels are compiled at first
_POLL_S = 0.25
_PORTS, _TRIED_PORTS = range(20_000, 32_000), 100  # Linux gives 32768 and up to outgoing connections
_STOP_LIMIT_S = 20.0


class ServerFailed(RuntimeError):
    """The server ended, or did not come up in time; the message holds the end of its log."""


class ServerProcess:
    """``python -m sglang.launch_server`` in a process group of its own, logging to a file."""

    def __init__(
        self, log: Path, arguments: Sequence[Any], *, device: str | None = None, tp: int = 1, dp: int = 1
    ) -> None:
        port, environment = free_port(), {}
        device = device or os.environ.get(DEVICE_VARIABLE, "cpu")
        if device == "cpu":
            environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
            if tp * dp > 1:
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp * dp)))
        given = shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
        arguments = ["--device", device, "--tp-size", tp, "--dp-size", dp, *arguments, *given]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self._ready_limit_s = _READY_LIMIT_S if device == "cpu" else _READY_LIMIT_OF_A_GPU_S
        command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", port, *arguments]
        self._command, self._environment = list(map(str, command)), {**os.environ, **environment}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = self._spawn()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @classmethod
    def start(cls, *args: Any, **kwargs: Any) -> "ServerProcess":
        """A server that is ready. Raises ServerFailed, and then nothing of it is left."""
        server = cls(*args, **kwargs)
        try:
            server.wait_until_ready()
        except BaseException:
            server.stop()
            raise
        return server

    def restart(self) -> None:
        """End it and start it again at its address. Raises ServerFailed."""
        self.stop()
        self.process = self._spawn()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until it has generated a token. Raises ServerFailed."""
        end_s = time.monotonic() + self._ready_limit_s
        while time.monotonic() < end_s:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {self.process.returncode}:\n{self.log_tail()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health_generate", timeout=30, trust_env=False).status_code == 200:
                    return
            time.sleep(_POLL_S)
        raise ServerFailed(f"the server was not ready within {self._ready_limit_s:.0f} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def status(self) -> dict[str, Any]:
        """``GET /draft/status``."""
        answer = httpx.get(f"{self.url}/draft/status", timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def stop(self) -> None:
        """Ask the server to end; what is left of its group after a while is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_LIMIT_S)
        end_s = time.monotonic() + _STOP_LIMIT_S / 4  # the trainer saves before it ends
        while time.monotonic() < end_s and self.has_processes():
            time.sleep(_POLL_S)
        self._signal_group(signal.SIGKILL)
        self.process.wait()

    def has_processes(self) -> bool:
        """Whether anything that it started is left, itself included."""
        return self._signal_group(0)

    def _spawn(self) -> subprocess.Popen:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _signal_group(self, number: int) -> bool:
        """Signal every process of the group; returns whether there was one."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


def free_port(in_a_row: int = 1) -> int:
    """The first of so many at which nobody listens now, and which no outgoing connection will be given."""
    for _ in range(_TRIED_PORTS):
        first = _PORTS.start + secrets.randbelow(len(_PORTS))
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + in_a_row):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError(f"no {in_a_row} free ports in a row among {_TRIED_PORTS} tries in {_PORTS}")
