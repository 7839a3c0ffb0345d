"""Servers whose processes, the trainer's among them, need not import SGLang and torch, which is most of a start on two
cores: each copies one that has.

Each process gets what it would get by ``spawn`` (its parent, its environment, its pickled arguments and nothing else of
its parent's), but begins as a spare that was forked before anything of SGLang had run.
"""

import io
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
from functools import cache
from multiprocessing import forkserver, popen_fork, popen_forkserver, popen_spawn_posix, process, reduction, spawn, util
from multiprocessing.context import ForkServerContext, SpawnProcess, set_spawning_popen
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import patch

from sglang_specforge import supervisor
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.settings import SERVER_PID_VARIABLE

_IMPORTED = [
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    "sglang_specforge.routes",
    "trainer.cli",
]
_READ_WHEN_IMPORTED = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
_READ_LATER = {
    "SGLANG_CPU_OMP_THREADS_BIND", "PYTEST_CURRENT_TEST", "GLOO_SOCKET_IFNAME", SERVER_PID_VARIABLE,
    "MKL_NUM_THREADS",  # of a trainer, where it says what OMP_NUM_THREADS does
}  # fmt: skip
_SPARES = 4  # of each process: two ranks, the detokenizer and the trainer; any more are spawned


class QuickServer(ServerProcess):
    """The same server, started as ever where its environment or device is another than usual."""

    def _spawn(self) -> Any:
        if _read_early(self._environment) != _usual():
            return super()._spawn()
        server = _with_sglang().Process(target=_serve, args=(self._command[1:], self._environment, self.log))
        server.start()
        return _Child(server)


def start_trainer(arguments: list[str], environment: dict[str, str], log: Path) -> "_Child":
    """One that no server starts, by what stands after ``python``."""
    trainer = _with_sglang().Process(target=_train, args=(arguments, environment, log))
    trainer.start()
    return _Child(trainer)


class _Child:
    """What is used of ``subprocess.Popen``."""

    def __init__(self, child: process.BaseProcess) -> None:
        self._child, self.pid, self.terminate, self.kill = child, child.pid, child.terminate, child.kill

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return self._child.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._child.join(timeout)
        if self._child.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._child.exitcode


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _READ_LATER}


@cache
def _usual() -> dict[str, str]:
    return _read_early({**os.environ, **_READ_WHEN_IMPORTED})


@cache
def _with_sglang() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with patch.dict(os.environ, _usual()):
        forkserver.ensure_running()
    return context


def _serve(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    _take_over(environment, log)
    _keep_spares()
    supervisor.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _start_supervised})
    _run(*arguments)


def _start_supervised(command: list[str], *, env: dict[str, str], stdout: BinaryIO, **same: Any) -> Any:
    """In the place of ``subprocess.Popen``."""
    if command[1:] != ["-m", "trainer"] or _read_early(env) != _read_early(dict(os.environ)):
        return subprocess.Popen(command, env=env, stdout=stdout, **same)
    trainer = SpawnProcess(target=_train, args=(command[1:], env, Path(stdout.name)), daemon=True)
    trainer.start()
    return _Child(trainer)


def _train(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    _take_over(environment, log)
    _run(*arguments)


def _take_over(environment: dict[str, str], log: Path) -> None:
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    _set_environment(environment)


def _run(kind: str, what: str, *arguments: str) -> None:
    """``python`` with these arguments: -m and a module, or -c and a program, and its own."""
    sys.argv = [what if kind == "-m" else kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class _Spare:
    """A child that waits for what it is to be; ends when nobody can tell it any more."""

    def __init__(self, others: list["_Spare"]) -> None:
        self.channel, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for channel in (self.channel, *(other.channel for other in others)):
                    channel.close()
                code = _become(theirs)
            finally:
                util._flush_std_streams()
                os._exit(code)
        theirs.close()


def _become(channel: socket.socket) -> int:
    said, received, *_ = socket.recv_fds(channel, 1, 250)
    if not said:
        return 0
    data, *forkserver._forkserver._inherited_fds = received
    _keep_spares()
    with open(data, "rb", buffering=0, closefd=False) as given:
        _set_environment(pickle.load(given))
    return spawn._main(data, os.dup(data))


def _keep_spares() -> None:
    """From here on, what this process spawns takes the place of a spare."""
    spares: list[_Spare] = []
    for _ in range(_SPARES):
        spares.append(_Spare(spares))

    def start(child: process.BaseProcess) -> popen_fork.Popen:
        return _FromSpare(child, spares.pop(0)) if spares else popen_spawn_posix.Popen(child)

    SpawnProcess._Popen = staticmethod(start)


class _FromSpare(popen_forkserver.Popen):
    """Hands files over as that does; the process is a child all the same, and waited for like one."""

    poll = popen_fork.Popen.poll

    def __init__(self, child: process.BaseProcess, spare: _Spare) -> None:
        self._spare = spare
        super().__init__(child)

    def _launch(self, child: process.BaseProcess) -> None:
        set_spawning_popen(self)
        try:
            pickled = io.BytesIO()
            for what in (dict(os.environ), spawn.get_preparation_data(child.name), child):
                reduction.dump(what, pickled)
        finally:
            set_spawning_popen(None)
        data, ours = os.pipe()
        socket.send_fds(self._spare.channel, [b"!"], [data, *self._fds])
        os.close(data)
        self.pid, self.sentinel = self._spare.pid, self._spare.channel.fileno()
        self.finalizer = util.Finalize(self, util.close_fds, (ours,))  # as this process ends: the child may ask for it
        with open(ours, "wb", closefd=False) as out:
            out.write(pickled.getbuffer())
