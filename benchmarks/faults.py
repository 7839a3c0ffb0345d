"""What clients notice when the reader of the stream fails: latency and failures against calm times (the peer)::

    python benchmarks/faults.py [--minutes 20] [--json FILE]

One real server under a steady load of streams; a reader as a trainer has it (``trainer/inbox.py``), but that learns
nothing, so that it takes no cores. Calm windows alternate with windows in which one thing is wrong. Also shown: memory
of the server's processes at the beginning and the end, and memory files that they hold.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import numpy as np
import psutil
import typer
from measuring import TINY_TARGET, save_record, start_capturing
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import run_of, wait_until_captured
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--draft-training-ring-mb", 2)
STREAMS, TOKENS, WINDOW_S = 4, 48, 10.0
READER = """
import signal, sys, time
from sglang_specforge.contracts.control import TokenLedger
from trainer.assemble import Assembler
from trainer.inbox import Inbox
slow = []
signal.signal(signal.SIGUSR1, lambda *_: slow.clear() if slow else slow.append(1))
ledger = TokenLedger()
inbox = Inbox(sys.argv[1], Assembler(ledger, 4096), ledger)
take = inbox.take
def take_slowly(frames):
    time.sleep(0.5 if slow else 0)
    return take(frames)
inbox.take = take_slowly
while True:
    inbox.receive(0.5)
"""


class Reader:
    """The process that reads the stream, and what can befall it."""

    def __init__(self, server: ServerProcess) -> None:
        self._server, run = server, run_of(server.url)
        self._spans, self._control = run.spans_endpoint, run.control_endpoint
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", READER, self._spans])
        wait_until_captured(self._server.url)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

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


@dataclass
class Load:
    """A number of streams, each followed by another; of each piece, when it came and how long after the one before."""

    came_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    requests: int = 0
    failures: list[str] = field(default_factory=list)

    async def run(self, url: str) -> None:
        prompts = stream_prompts(seed=5)
        async with (
            httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(STREAMS):
                tasks.create_task(self._keep_asking(client, prompts))

    async def _keep_asking(self, client: httpx.AsyncClient, prompts: Iterator[str]) -> None:
        while True:
            body = {
                "text": next(prompts), "stream": True,
                "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
            }  # fmt: skip
            self.requests += 1
            try:
                await self._ask(client, body)
            except (httpx.HTTPError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        last_s, done = None, False
        async with client.stream("POST", "/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                now_s = time.monotonic()
                if last_s is not None:
                    self.came_s.append(now_s)
                    self.waited_s.append(now_s - last_s)
                last_s = now_s
        if not done:
            raise ValueError("the answer ended early")


class Window(NamedTuple):
    name: str
    begin_s: float
    end_s: float


async def run_windows(server: ServerProcess, reader: Reader, minutes: float) -> tuple[Load, list[Window]]:
    """Calm and fault by turns."""
    faults: dict[str, Callable[[], AbstractContextManager]] = {
        "killed": reader.killed,
        "stopped": reader.stopped,
        "slow": reader.slow,
        "socket deleted": reader.socket_deleted,
        "rubbish sent": reader.rubbish,
    }
    load, windows, end_s = Load(), [], time.monotonic() + 60 * minutes
    task = asyncio.create_task(load.run(server.url))
    await asyncio.sleep(WINDOW_S)  # warms up
    names = [name for fault in faults for name in ("calm", fault)]
    while len(windows) < len(names) or time.monotonic() < end_s:
        name = names[len(windows) % len(names)]
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, faults.get(name, nullcontext)())
            begun_s = time.monotonic()
            await asyncio.sleep(WINDOW_S)
            windows.append(Window(name, begun_s, time.monotonic()))
            await asyncio.to_thread(stack.close)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return load, windows


def resident_mb(server: ServerProcess) -> float:
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20


def memory_files(server: ServerProcess) -> int:
    """Shared memory of ours that the server's processes hold open."""
    root = psutil.Process(server.process.pid)
    links = [link for p in [root, *root.children(recursive=True)] for link in Path(f"/proc/{p.pid}/fd").iterdir()]
    return sum(os.readlink(link).startswith("/memfd:specforge") for link in links)


def p99_ms(load: Load, windows: list[Window], name: str) -> float:
    came, waited = np.array(load.came_s), np.array(load.waited_s)
    inside = np.any([(came >= begin) & (came < end) for n, begin, end in windows if n == name], axis=0)
    return float(1000 * np.percentile(waited[inside], 99))


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = TINY_TARGET,
    minutes: Annotated[float, typer.Option(help="At least so long; each fault comes at least once.")] = 20.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder, start_capturing(target, Path(folder), *SERVING) as server:
        reader = Reader(server)
        asyncio.run(run_windows(server, reader, 0.5))  # until buffers have their size
        before_mb, files = resident_mb(server), memory_files(server)
        load, windows = asyncio.run(run_windows(server, reader, minutes))
        after_mb, files_after = resident_mb(server), memory_files(server)
        (export,) = server.status()["export"]
        reader.end()
    table = Table(title=f"{load.requests} requests, {len(load.failures)} failed; {minutes:g} minutes")
    for column in ("", "windows", "p99 between pieces, ms", "ratio to calm"):
        table.add_column(column, justify="right")
    found = {name: p99_ms(load, windows, name) for name in dict.fromkeys(name for name, _, _ in windows)}
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
        save_record(json_file, " ".join(sys.argv), ratios, records)


if __name__ == "__main__":
    typer.run(main)
