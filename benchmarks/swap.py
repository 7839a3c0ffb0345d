"""What clients notice of a swap every second, against calm times, and against SGLang's own way of changing weights::

    python benchmarks/swap.py [--minutes 6] [--quick] [--json FILE]

Two real servers, one after the other, under the same steady load of streams. On the first, two draft versions that are
resident take turns every second (``POST /draft/activate``). On the second, without the plugin, SGLang's
``POST /update_weights_from_disk`` loads the target's weights again every second: it cannot change a draft alone. Each
is compared with calm windows of the same server in between. What a client waits for has prefills of others in it; the
server itself tells how long a step with a swap takes, from one verification to the next.
"""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, add_random_draft, save_record, start_capturing, start_plain
from rich.console import Console
from rich.table import Table
from steady_load import WINDOW_S, Load, Window, by_turns, waits_ms

from sglang_specforge.server_process import ServerProcess

EVERY_S = 1.0
SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16)
UNWATCHED = ("--draft-gate", "off")


class Changes:
    """Of the served weights, one every second for as long as ``happening``; how many, and how many failed."""

    def __init__(self, change: Callable[[int], httpx.Response]) -> None:
        self._change = change
        self.made, self.failed = 0, []

    @contextlib.contextmanager
    def happening(self) -> Iterator[None]:
        over = threading.Event()

        def keep_changing() -> None:
            while not over.wait(EVERY_S):
                answer = self._change(self.made)
                self.made += 1
                if answer.is_error:
                    self.failed.append(answer.text)

        thread = threading.Thread(target=keep_changing)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def post(server: ServerProcess, path: str, body: dict) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120, trust_env=False)


def measure(
    server: ServerProcess, name: str, change: Callable[[int], httpx.Response], minutes: float, window_s: float
) -> tuple[Load, list[Window], Changes]:
    changes = Changes(change)
    load, windows = asyncio.run(by_turns(server.url, {name: changes.happening}, minutes, window_s))
    return load, windows, changes


def main(
    target: Target = TINY_TARGET,
    minutes: Annotated[float, typer.Option(help="On the first server, half of it calm; on the second, a third.")] = 6.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    minutes, window_s = (0.0, 4.0) if quick else (minutes, WINDOW_S)
    measured: dict[str, tuple[Load, list[Window], Changes]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start_capturing(target, folder, *SERVING, *UNWATCHED) as server:
            versions = [add_random_draft(server, target, folder, seed) for seed in (1, 2)]
            measured["swap"] = measure(
                server,
                "swap",
                lambda i: post(server, "/draft/activate", {"version": versions[i % 2]}),
                minutes,
                window_s,
            )
            status = server.status()
            longest_ms = 1000 * status["draft"]["longest_swap_s"]
            steps = status["export"][0]["swap_steps"]
        with start_plain(target, folder, *SERVING) as server:
            body = {"model_path": str(target)}
            measured["update_weights_from_disk"] = measure(
                server,
                "update_weights_from_disk",
                lambda i: post(server, "/update_weights_from_disk", body),
                minutes / 3,
                window_s,
            )
    table = Table("", "requests", "failed", "changes", "failed", "median, ms", "p99, ms", "longest, ms", "p99 to calm",
                  "longest to median", title="between two pieces of a stream")  # fmt: skip
    ratios, samples = {}, []
    for name, (load, windows, changes) in measured.items():
        calm, waits = (waits_ms(load, windows, of) for of in ("calm", name))
        for label, found in ((f"calm, then {name}", calm), (name, waits)):
            median, p99, longest = (*np.quantile(found, (0.5, 0.99)), found.max())
            p99_ratio, longest_ratio = p99 / np.quantile(calm, 0.99), longest / median
            counts = [load.requests, len(load.failures), changes.made, len(changes.failed)]
            figures = [f"{x:.1f}" for x in (median, p99, longest)]
            table.add_row(label, *map(str, counts), *figures, f"{p99_ratio:.3f}", f"{longest_ratio:.2f}")
            ratios |= {f"{label}: p99 / calm": p99_ratio, f"{label}: longest / median": longest_ratio}
            samples.append({"window": label, "requests": load.requests, "failed": len(load.failures),
                            "changes": changes.made, "failed changes": len(changes.failed), "median_ms": median,
                            "p99_ms": p99, "longest_ms": longest})  # fmt: skip
        for failure in (load.failures + changes.failed)[:1]:
            print(f"first failure of {name}: {failure[:300]}")
    Console(width=160).print(table)
    print(
        f"in the scheduler: longest copy of a swap {longest_ms:.2f} ms; longest of {steps['timed']} steps with a swap "
        f"{steps['longest_to_median']:.2f} times the median of those without, at its batch size"
    )
    if json_file:
        ratios["longest step with a swap / median step without"] = steps["longest_to_median"]
        samples.append({"longest_copy_ms": longest_ms, "steps_with_a_swap": steps["timed"]})
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
