"""What a draft costs before it has learnt, and brings afterwards, against a server without speculation (the peer)::

    python benchmarks/drafting.py [--draft DIR] [--quick] [--json FILE]

Two real servers, both running, and the same requests by turns: one without speculation and without the plugin, one
with a random draft, ``--draft-drafting auto`` and a consumer that receives what is captured. With ``--draft``, that
draft then takes the random one's place, and after the server's next trial the turns go on. Shown is the geometric mean
of the rounds' ratios of tokens a second with its 95% confidence interval; trials are part of what is measured.
"""

import math
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import scipy.stats
import typer
from capture_overhead import Consumer
from measuring import TINY_TARGET, save_record, start_capturing
from rich.console import Console
from rich.table import Table

from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--disable-radix-cache")
PLAIN = ("--dtype", "float32", "--log-level", "warning", "--sleep-on-idle")
TOKENS, CONCURRENCY = 96, 8


def tokens_per_s(server: ServerProcess, prompts: list[str]) -> float:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    begun_s = time.perf_counter()
    answer = httpx.post(
        f"{server.url}/generate", json={"text": prompts, "sampling_params": sampling}, timeout=600, trust_env=False
    ).raise_for_status()
    generated = sum(one["meta_info"]["completion_tokens"] for one in answer.json())
    return generated / (time.perf_counter() - begun_s)


def drafting(server: ServerProcess) -> dict[str, Any]:
    return server.status()["draft"]["drafting"]


def settle(server: ServerProcess, prompts: list[str]) -> dict[str, Any]:
    """Drive the server until it has tried its draft once more."""
    before = drafting(server)["trials"]
    while drafting(server)["trials"] == before:
        tokens_per_s(server, prompts)
    return drafting(server)


def take_rounds(name: str, servers: dict[str, ServerProcess], prompts: list[str], rounds: int) -> list[dict[str, Any]]:
    found = []
    for i in range(rounds):
        order = list(servers) if i % 2 else list(servers)[::-1]
        speed = {arm: tokens_per_s(servers[arm], prompts) for arm in order}
        found.append({"draft": name, "round": i, **speed, "ratio": speed["auto"] / speed["plain"]})
    return found


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = TINY_TARGET,
    draft: Annotated[Path | None, typer.Option(help="Folder of a draft that has learnt.")] = None,
    quick: Annotated[bool, typer.Option(help="6 rounds instead of 30.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    rounds, prompts = (6 if quick else 30), list(islice(stream_prompts(seed=11), CONCURRENCY))
    table = Table(title=f"{rounds} rounds of {CONCURRENCY} requests, {TOKENS} tokens each")
    for column in ("draft", "drafting", "break-even", "tokens/s", "no speculation", "ratio", "95% interval", "lowest"):
        table.add_column(column)
    ratios, samples = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            ServerProcess.start(folder / "plain", ["--model-path", target, *PLAIN, *SERVING]) as plain,
            start_capturing(target, folder, *SERVING, "--draft-drafting", "auto", "--draft-gate", "off") as auto,
        ):
            servers, consumer = {"plain": plain, "auto": auto}, Consumer(auto)
            with consumer.reading():
                for label in ("random", *(["learnt"] if draft else [])):
                    if label == "learnt":
                        body = {"path": str(draft.absolute())}
                        httpx.post(
                            f"{auto.url}/draft/versions", json=body, timeout=120, trust_env=False
                        ).raise_for_status()
                    state = settle(auto, prompts)
                    found = take_rounds(label, servers, prompts, rounds)
                    logs = [math.log(one["ratio"]) for one in found]
                    reach = scipy.stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
                    mean, speeds = statistics.fmean(logs), {
                        arm: statistics.median(one[arm] for one in found) for arm in servers
                    }  # fmt: skip
                    table.add_row(
                        label, state["depth"], f"{state['break_even_length']:.2f}", f"{speeds['auto']:.0f}",
                        f"{speeds['plain']:.0f}", f"{math.exp(mean):.3f}",
                        f"{math.exp(mean - reach):.3f} to {math.exp(mean + reach):.3f}",
                        f"{min(one['ratio'] for one in found):.3f}",
                    )  # fmt: skip
                    ratios[f"tokens/s, {label} draft / no speculation"] = math.exp(mean)
                    samples += [found, state]
            consumer.end()
    Console(width=140).print(table)
    if json_file:
        save_record(json_file, " ".join(sys.argv), ratios, samples)


if __name__ == "__main__":
    typer.run(main)
