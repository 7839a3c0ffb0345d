"""Traffic turns from one family of prompts to another while the draft learns, against a draft that only ever saw the
second::

    python benchmarks/drift.py [--minutes 3] [--quick] [--json FILE]

A real server with draft training gets prompts of prose for so many minutes and then tables of numbers for as many. The
peer is a second server, with the same settings, that gets numbers alone for as long. Shown is the acceptance length of
the last half minute before the turn, of the worst half minute after it, and at the end, beside the peer's.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, save_record, stop_at_failures
from rich.console import Console
from rich.table import Table

from sglang_specforge import traffic
from sglang_specforge.demo import LOOK_EVERY_S, SERVING, driving
from sglang_specforge.demo import TRAINING as DEMO_TRAINING
from sglang_specforge.demo_curve import WINDOW_S, Curve, Look
from sglang_specforge.server_process import ServerProcess

TRAINING = (*DEMO_TRAINING, "--draft-drafting", "always")  # acceptance is to be seen all the time
TOLD = ("drift", "drift_over", "activated", "rolled_back")


async def learn(server: ServerProcess, families: Sequence[traffic.Family], phase_s: float) -> tuple[Curve, list[int]]:
    """Ask about one family after the other; returns the looks, and how many of them each phase has."""
    curve, tally, phases = Curve(), traffic.Tally(), []
    for family in families:
        async with driving(server, tally, family):
            end_s, seen = tally.elapsed_s + phase_s, len(curve.looks)
            while tally.elapsed_s < end_s:
                await asyncio.sleep(LOOK_EVERY_S)
                curve.looks.append(Look.at(await asyncio.to_thread(server.status), tally))
                if len(curve.looks) % 10 == 0:
                    print(f"{family or 'all'}: {curve.line()}", flush=True)
        phases.append(len(curve.looks) - seen)
    stop_at_failures(tally)
    return curve, phases


def measure(
    target: Path, folder: Path, families: Sequence[traffic.Family], phase_s: float, window_s: float
) -> tuple[list[float], list[dict[str, Any]]]:
    """Acceptance lengths at the end of each phase, and the lowest of the last one's windows in between; events."""
    given = ["--model-path", target, *SERVING, *TRAINING, "--draft-training-run-dir", folder / "run"]
    with ServerProcess.start(folder / "log", given) as server:
        curve, phases = asyncio.run(learn(server, families, phase_s))
        events = httpx.get(f"{server.url}/draft/events?last=1000", trust_env=False).json()
    last = sum(phases[:-1])
    whole = [i for i in range(last, len(curve.looks)) if curve.looks[i].s - curve.looks[last].s >= window_s]
    ends = [last - 1, *whole] if last else [whole[-1]]
    lengths = [curve.up_to(i, window_s).acceptance_length for i in ends]
    return lengths, [event for event in events if event["event"] in TOLD]


def main(
    target: Target = TINY_TARGET,
    minutes: Annotated[float, typer.Option(min=1, help="Of each family of prompts.")] = 3.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    phase_s, window_s = (7.0, 3.0) if quick else (60 * minutes, WINDOW_S)
    with tempfile.TemporaryDirectory() as name:
        turned, events = measure(target, Path(name) / "turned", ("prose", "numbers"), phase_s, window_s)
        alone, _ = measure(target, Path(name) / "alone", ("numbers",), phase_s, window_s)
    before, worst, end = turned[0], min(turned[1:]), turned[-1]
    table = Table(f"acceptance length, of {window_s:g} s", "prose, then numbers", "numbers alone", title="drift")
    for label, found, peer in (("before the turn", before, None), ("worst after it", worst, None),
                               ("at the end", end, alone[-1])):  # fmt: skip
        table.add_row(label, f"{found:.3f}", f"{peer:.3f}" if peer else "")
    Console(width=120).print(table)
    print(f"at the end, to numbers alone: {end / alone[-1]:.3f}")
    for event in events:
        print(event["time"], event["event"], event["who"], event.get("version", ""), event["why"])
    if json_file:
        ratios = {"worst after the turn / before it": worst / before, "end / numbers alone": end / alone[-1]}
        samples = [{"before": before, "worst": worst, "end": end, "alone": alone[-1]}, *events]
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
