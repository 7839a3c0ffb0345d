"""What a draft costs before it has learnt, and brings afterwards, against a server without speculation (the peer)::

    python benchmarks/drafting.py [--target DIR] [--draft DIR] [--requests N] [--quick] [--json FILE]

Two real servers, both running, and the same load of chats by turns: one without speculation and without the plugin, and
one with a random draft and ``--draft-drafting auto``, once with nobody attached and once with a consumer that receives
what is captured. With ``--draft``, that draft then takes the random one's place, and after the server's next trial the
turns go on. Shown is the geometric mean of the rounds' ratios of tokens a second with its 95% confidence interval;
trials are part of what is measured.
"""

import asyncio
import contextlib
import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from capture_overhead import Consumer
from measuring import (
    TINY_TARGET,
    JsonFile,
    Quick,
    Target,
    mean_ratio,
    save_record,
    start_capturing,
    start_plain,
    stop_at_failures,
)
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import ask
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import Tally, drive, stream_prompts

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16)
AUTO = ("--draft-drafting", "auto", "--draft-gate", "off", "--draft-training-draft-vocab-size", 32000)  # as the demo's
LOAD = {"concurrency": 8, "max_tokens": 96, "temperature": 0.0}
ARMS = ("no speculation", "nobody attached", "consumer")


def tokens_per_s(server: ServerProcess, requests: int) -> float:
    tally = Tally()
    asyncio.run(drive(server.url, stream_prompts(seed=0), tally, requests=requests, **LOAD))
    stop_at_failures(tally)
    return tally.tokens_per_s


def drafting(server: ServerProcess) -> dict[str, Any]:
    return server.status()["draft"]["drafting"]


def settle(server: ServerProcess, requests: int) -> dict[str, Any]:
    """Drive the server until it has tried its draft once more."""
    before = drafting(server)["trials"]
    while drafting(server)["trials"] == before:
        tokens_per_s(server, requests)
    return drafting(server)


def take_rounds(
    plain: ServerProcess, auto: ServerProcess, consumer: Consumer, rounds: int, requests: int
) -> list[dict[str, float]]:
    found = []
    for i in range(rounds):
        speed = {}
        for arm in random.Random(i).sample(ARMS, len(ARMS)):
            with consumer.reading() if arm == "consumer" else contextlib.nullcontext():
                speed[arm] = tokens_per_s(plain if arm == "no speculation" else auto, requests)
        found.append(speed)
    return found


def main(
    target: Target = TINY_TARGET,
    draft: Annotated[Path | None, typer.Option(help="Folder of a draft that has learnt.")] = None,
    requests: Annotated[int, typer.Option(min=8, help="Of a turn; few where the target is slow.")] = 40,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    rounds, requests = (2, min(requests, 12)) if quick else (8, requests)
    table = Table("draft", "drafting", "break-even", "last gain", "arm", "tokens/s", "ratio", "95% interval",
                  title=f"{rounds} rounds of {requests} requests")  # fmt: skip
    ratios, samples = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            start_plain(target, folder, *SERVING) as plain,
            start_capturing(target, folder, *SERVING, *AUTO) as auto,
        ):
            consumer = Consumer(auto)
            for label in ("random", *(["learnt"] if draft else [])):
                if label == "learnt":
                    ask("POST", auto.url, "/draft/versions", None, json={"path": str(draft.absolute())}, timeout=120)
                settle(auto, requests)
                found = take_rounds(plain, auto, consumer, rounds, requests)
                state = drafting(auto)
                told = [label, state["depth"], f"{state['break_even_length']:.2f}", f"{state['gain']:.2f}"]
                for arm in ARMS:
                    ratio, low, high = mean_ratio([one[arm] / one["no speculation"] for one in found])
                    speed = statistics.median(one[arm] for one in found)
                    table.add_row(*told, arm, f"{speed:.0f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
                    told = [""] * len(told)
                    if arm != "no speculation":
                        ratios[f"tokens/s, {label} draft, {arm} / no speculation"] = ratio
                samples.append({"draft": label, "drafting": state, "rounds": found})
            consumer.end()
    Console(width=140).print(table)
    if json_file:
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
