"""What capture costs a server: throughput with capture on against the same server with capture paused (the peer)::

    python benchmarks/capture_overhead.py [--target DIR] [--quick] [--json FILE]

One real server, one load (the same greedy requests, no prefix cache), and three states that alternate in every round:
paused (``POST /draft/capture``); nobody attached; and a consumer in a process of its own that receives everything as a
trainer does and throws it away. Rounds are short and many, as the speed of a shared machine drifts. Shown is the
geometric mean of the rounds' ratios with its 95% confidence interval, what a pass costs the scheduler thread, and how
much was captured.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx
import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, mean_ratio, save_record, start_capturing
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import wait_until_captured
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts

ARMS = ("paused", "nobody attached", "consumer")
SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--disable-radix-cache")
CONSUMER = """
import select, sys
from sglang_specforge.contracts.control import TokenLedger
from trainer.inbox import Inbox

class Discard:
    def add(self, *message):
        return []

for _ in sys.stdin:
    inbox = Inbox(sys.argv[1], Discard(), TokenLedger())
    while not select.select([sys.stdin], [], [], 0)[0]:
        inbox.receive(0.2)
    sys.stdin.readline()
    inbox.close()
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


class Consumer:
    """A process that reads the server's stream, as a trainer does, and throws it away; while it is told to."""

    def __init__(self, server: ServerProcess) -> None:
        command = [sys.executable, "-c", CONSUMER, server.status()["spans_endpoint"]]
        self._server, self._process = server, subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._process.stdin.write(b"read\n")
        wait_until_captured(self._server.url)
        yield
        self._process.stdin.write(b"leave\n")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    server: ServerProcess, consumer: Consumer, arm: str, number: int, prompts: list[str], tokens: int
) -> Measured:
    httpx.post(f"{server.url}/draft/capture", json={"enabled": arm != "paused"}, trust_env=False).raise_for_status()
    with consumer.reading() if arm == "consumer" else nullcontext():
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
    prompts, consumer = list(islice(stream_prompts(seed=11), requests)), Consumer(server)
    measure(server, consumer, "consumer", -1, prompts, tokens)  # warms up
    order = [random.Random(i).sample(ARMS, len(ARMS)) for i in range(rounds)]
    found = [measure(server, consumer, arm, i, prompts, tokens) for i, arms in enumerate(order) for arm in arms]
    consumer.end()
    return found


def ratio(measured: list[Measured], arm: str) -> tuple[float, float, float]:
    """Throughput against the paused arm of the same round: geometric mean, and its 95% confidence interval."""
    speed = {(m.round, m.arm): m.tokens_per_s for m in measured}
    return mean_ratio([speed[r, arm] / speed[r, "paused"] for r, a in speed if a == "paused"])


def main(
    target: Target = TINY_TARGET,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    rounds, requests, tokens = (6 if quick else 60), 16, 32
    with tempfile.TemporaryDirectory() as folder, start_capturing(target, Path(folder), *SERVING) as server:
        measured = take_rounds(server, rounds, requests, tokens)
    table = Table(title=f"{rounds} rounds of {requests} requests, {tokens} tokens each; throughput against paused")
    for column in ("", "ratio", "95% interval", "tokens/s", "scheduler thread, us a pass", "captured/s"):
        table.add_column(column)
    found = {}
    for arm in ARMS:
        own = [m for m in measured if m.arm == arm]
        found[arm], low, high = ratio(measured, arm)
        table.add_row(
            arm, f"{found[arm]:.3f}", f"{low:.3f} to {high:.3f}",
            f"{statistics.median(m.tokens_per_s for m in own):.1f}",
            f"{statistics.median(m.scheduler_us_per_pass for m in own):.0f}",
            f"{statistics.median(m.captured_tokens / m.seconds for m in own):.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if json_file:
        named = {f"throughput, {arm} / paused": found[arm] for arm in ARMS[1:]}
        save_record(json_file, named, [vars(m) for m in measured])


if __name__ == "__main__":
    typer.run(main)
