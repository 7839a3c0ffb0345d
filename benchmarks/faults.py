"""What clients notice when the reader of the stream fails: latency and failures against calm times (the peer)::

    python benchmarks/faults.py [--minutes 20] [--quick] [--json FILE]

One real server under a steady load of streams; a reader as a trainer has it (``trainer/inbox.py``, with a prefix store
that spills to disk), but that learns nothing, so that it takes no cores. Calm windows alternate with windows in which
one thing is wrong. Also shown: memory of the server's processes at the beginning and the end, and memory files that
they hold.
"""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, save_record, start_capturing
from rich.console import Console
from rich.table import Table
from steady_load import WINDOW_S, Load, Window, by_turns, waits_ms

from sglang_specforge.client import run_of, wait_until_captured
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.target import load_target_config
from trainer.prefix_store import block_bytes

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--draft-training-ring-mb", 2)
READER = """
import signal, sys, time
from pathlib import Path
from sglang_specforge.contracts.control import TokenLedger
from trainer.assemble import Assembler
from trainer.inbox import Inbox
from trainer.prefix_store import PrefixStore
from trainer.spill import Spill
slow = []
signal.signal(signal.SIGUSR1, lambda *_: slow.clear() if slow else slow.append(1))
ledger, spill = TokenLedger(), Spill(Path(sys.argv[2]), 64 << 20, int(sys.argv[3]))
inbox = Inbox(sys.argv[1], Assembler(ledger, 4096, PrefixStore("target", 1 << 20, spill)), ledger)
take = inbox.take
def take_slowly(frames):
    time.sleep(0.5 if slow else 0)
    return take(frames)
inbox.take = take_slowly
print(flush=True)
while True:
    inbox.receive(0.5)
"""


class Reader:
    """The process that reads the stream, and what can befall it."""

    def __init__(self, server: ServerProcess, spill_folder: str) -> None:
        self._server, self._spill_folder, run = server, spill_folder, run_of(server.url)
        self._spans, self._control = run.spans_endpoint, run.control_endpoint
        hidden_size = load_target_config(Path(run.target_path)).hidden_size
        self._slot_bytes = block_bytes(hidden_size, getattr(torch, run.served_dtype))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", READER, self._spans, self._spill_folder, str(self._slot_bytes)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.process.stdout.readline()  # the server may not have noticed yet that the one before is gone
        wait_until_captured(self._server.url)

    def end(self) -> None:
        with self.process:
            self.process.kill()

    @contextmanager
    def killed(self) -> Iterator[None]:
        self.end()
        yield
        self.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        yield
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def slow(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGUSR1)
        yield
        self.process.send_signal(signal.SIGUSR1)

    @contextmanager
    def disk_full(self) -> Iterator[None]:
        """For its spill: its files may not grow past their first byte."""
        limits = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        yield
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    @contextmanager
    def socket_deleted(self) -> Iterator[None]:
        """Its file; whoever is connected stays so, and the next reader makes another."""
        Path(self._spans.removeprefix("ipc://")).unlink()
        yield
        self.end()
        self.start()

    @contextmanager
    def rubbish(self) -> Iterator[None]:
        """To the server, in the place of what a trainer says."""
        sender = [sys.executable, "-c", _RUBBISH, self._control]
        with subprocess.Popen(sender) as process:
            yield
            process.kill()


_RUBBISH = """
import os, sys, time, zmq
socket = zmq.Context().socket(zmq.PUSH)
socket.connect(sys.argv[1])
while True:
    socket.send(os.urandom(200))
    time.sleep(0.02)
"""


async def run_windows(
    server: ServerProcess, reader: Reader, minutes: float, window_s: float = WINDOW_S
) -> tuple[Load, list[Window]]:
    """Calm and fault by turns."""
    faults = {
        "killed": reader.killed,
        "stopped": reader.stopped,
        "slow": reader.slow,
        "disk full": reader.disk_full,
        "socket deleted": reader.socket_deleted,
        "rubbish sent": reader.rubbish,
    }
    return await by_turns(server.url, faults, minutes, window_s)


def resident_mb(server: ServerProcess) -> float:
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20


def memory_files(server: ServerProcess) -> int:
    """Shared memory of ours that the server's processes hold open."""
    root = psutil.Process(server.process.pid)
    links = [link for p in [root, *root.children(recursive=True)] for link in Path(f"/proc/{p.pid}/fd").iterdir()]
    return sum(_leads_to(link).startswith("/memfd:specforge") for link in links)


def _leads_to(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed since it was listed
        return ""


def main(
    target: Target = TINY_TARGET,
    minutes: Annotated[float, typer.Option(help="At least so long; each fault comes at least once.")] = 20.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    minutes, window_s = (0.0, 2.0) if quick else (minutes, WINDOW_S)
    with tempfile.TemporaryDirectory() as folder, start_capturing(target, Path(folder), *SERVING) as server:
        reader = Reader(server, folder)
        if not quick:
            asyncio.run(run_windows(server, reader, 0.5))  # until buffers have their size
        before_mb, files = resident_mb(server), memory_files(server)
        load, windows = asyncio.run(run_windows(server, reader, minutes, window_s))
        after_mb, files_after = resident_mb(server), memory_files(server)
        (export,) = server.status()["export"]
        reader.end()
    table = Table(title=f"{load.requests} requests, {len(load.failures)} failed; windows of {window_s:g} s")
    for column in ("", "windows", "p99 between pieces, ms", "ratio to calm"):
        table.add_column(column, justify="right")
    found = {
        name: float(np.percentile(waits_ms(load, windows, name), 99))
        for name in dict.fromkeys(name for name, _, _ in windows)
    }
    for name, value in found.items():
        count = sum(n == name for n, _, _ in windows)
        table.add_row(name, str(count), f"{value:.1f}", f"{value / found['calm']:.3f}")
    Console(width=120).print(table)
    print(f"memory of the server's processes: {before_mb:.0f} MB before, {after_mb:.0f} MB after")
    print(f"shared memory files held: {files} before, {files_after} after; capture failed: {export['failure']}")
    print(f"requests: {export['requests']}")
    if json_file:
        ratios = {f"p99 between pieces, {name} / calm": value / found["calm"] for name, value in found.items()}
        ratios |= {"memory after / before": after_mb / before_mb, "failed requests": len(load.failures)}
        records = [{"window": n, "begin_s": b - windows[0][1], "end_s": e - windows[0][1]} for n, b, e in windows]
        save_record(json_file, ratios, records)


if __name__ == "__main__":
    typer.run(main)
