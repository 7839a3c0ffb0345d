"""What capture costs a server: throughput with capture on against the same server with capture paused (the peer)::

    python benchmarks/capture_overhead.py [--target DIR] [--quick] [--json FILE]

One real server, one load (the same greedy requests, no prefix cache), and three states that alternate in every round:
paused (``POST /draft/capture``); nobody attached; and a consumer in a process of its own that receives everything and
throws it away. Also shown: what a pass costs the scheduler thread, and the bytes captured.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from measuring import TINY_TARGET, save_record, start_capturing
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import wait_until_captured
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts

ARMS = ("paused", "nobody attached", "consumer")
SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--disable-radix-cache")
CONSUMER = """
import sys, zmq
socket = zmq.Context().socket(zmq.PULL)
socket.bind(sys.argv[1])
while True:
    socket.recv_multipart(copy=False)
"""


@dataclass(frozen=True)
class Measured:
    """One arm of one round."""

    arm: str
    round: int
    seconds: float
    tokens_per_s: float
    passes: int
    scheduler_us_per_pass: float
    captured_tokens: int


class Consumer(AbstractContextManager):
    """Reads the server's stream and throws it away, in a process of its own."""

    def __init__(self, server: ServerProcess) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", CONSUMER, server.status()["spans_endpoint"]])
        wait_until_captured(server.url)

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()


def measure(server: ServerProcess, arm: str, number: int, prompts: list[str], tokens: int) -> Measured:
    httpx.post(f"{server.url}/draft/capture", json={"enabled": arm != "paused"}, trust_env=False).raise_for_status()
    with Consumer(server) if arm == "consumer" else nullcontext():
        wait_for_state(server, {"paused": "paused", "nobody attached": "nobody_listening", "consumer": None}[arm])
        before = counters(server)
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        started_s = time.perf_counter()
        answer = httpx.post(
            f"{server.url}/generate", json={"text": prompts, "sampling_params": sampling}, timeout=600, trust_env=False
        ).raise_for_status()
        seconds = time.perf_counter() - started_s
        after = counters(server)
    generated = sum(a["meta_info"]["completion_tokens"] for a in answer.json())
    passes, scheduler_s, captured = (b - a for a, b in zip(before, after, strict=True))
    return Measured(arm, number, seconds, generated / seconds, passes, 1e6 * scheduler_s / passes, captured)


def wait_for_state(server: ServerProcess, closed: str | None) -> None:
    while any(export["closed"] != closed for export in server.status()["export"]):
        time.sleep(0.05)


def counters(server: ServerProcess) -> tuple[int, float, int]:
    exports = server.status()["export"]
    return tuple(sum(export[key] for export in exports) for key in ("passes", "scheduler_s", "captured"))


def take_rounds(server: ServerProcess, rounds: int, requests: int, tokens: int) -> list[Measured]:
    prompts = list(islice(stream_prompts(seed=11), requests))
    measure(server, "consumer", -1, prompts, tokens)  # warms up
    order = [ARMS[i % 3 :] + ARMS[: i % 3] for i in range(rounds)]
    return [measure(server, arm, i, prompts, tokens) for i, arms in enumerate(order) for arm in arms]


def ratios(measured: list[Measured], arm: str) -> list[float]:
    """Throughput against the paused arm of the same round."""
    speed = {(m.round, m.arm): m.tokens_per_s for m in measured}
    return sorted(speed[r, arm] / speed[r, "paused"] for r, a in speed if a == arm)


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = TINY_TARGET,
    quick: Annotated[bool, typer.Option(help="3 rounds of 3 s instead of 9 of 7 s.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    rounds, requests, tokens = (3, 16, 48) if quick else (9, 32, 64)
    with tempfile.TemporaryDirectory() as folder, start_capturing(target, Path(folder), *SERVING) as server:
        measured = take_rounds(server, rounds, requests, tokens)
    table = Table(title=f"{rounds} rounds of {requests} requests, {tokens} tokens each; throughput against paused")
    for column in ("", "ratio, median", "lowest", "highest", "tokens/s", "scheduler thread, us a pass", "captured/s"):
        table.add_column(column)
    found = {}
    for arm in ARMS:
        own, against = [m for m in measured if m.arm == arm], ratios(measured, arm)
        found[arm] = statistics.median(against)
        table.add_row(
            arm, f"{found[arm]:.3f}", f"{against[0]:.3f}", f"{against[-1]:.3f}",
            f"{statistics.median(m.tokens_per_s for m in own):.1f}",
            f"{statistics.median(m.scheduler_us_per_pass for m in own):.0f}",
            f"{statistics.median(m.captured_tokens / m.seconds for m in own):.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if json_file:
        named = {f"throughput, {arm} / paused": found[arm] for arm in ARMS[1:]}
        save_record(json_file, " ".join(sys.argv), named, [vars(m) for m in measured])


if __name__ == "__main__":
    typer.run(main)
