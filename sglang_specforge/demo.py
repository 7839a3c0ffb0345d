"""``make demo``: a server with a random draft gets better at speculation while requests keep flowing.

The same traffic is measured against a server without speculation first, then against one with draft training.
"""

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from sglang_specforge import status_view, traffic
from sglang_specforge.server_process import ServerFailed, ServerProcess

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

console = Console()

_LOOK_EVERY_S = 2.0
_WINDOW_S = 30.0
_TRAFFIC = {"concurrency": 8, "max_tokens": 128, "temperature": 0.0}
_RISE = 1.5  # acceptance after, over before, that the demo has to show

SERVING = (
    "--dtype", "float32", "--max-total-tokens", 32768, "--max-running-requests", 16, "--random-seed", 0,
    "--log-level", "warning",
)  # fmt: skip
TRAINING = {
    "publish-every-s": 20, "learning-rate": 2e-3, "warmup-steps": 20, "ttt-steps": 3, "loss-on": "all",
    "batch-tokens": 1024, "epochs-per-token": 16, "draft-vocab-size": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One look at the running server."""

    s: float
    passes: int
    committed: int
    completion_tokens: int
    version: int
    trained: int

    @classmethod
    def at(cls, s: float, status: dict[str, Any], tally: traffic.Tally) -> "Look":
        acceptance, draft, tokens = status["acceptance"], status["draft"], status["tokens"]
        return cls(
            s, acceptance["passes"], acceptance["tokens"], tally.completion_tokens, draft["active_version"],
            tokens["trained"],
        )  # fmt: skip


def run_demo(
    model: Annotated[Path, typer.Option(help="Target to serve.")] = Path("examples/tiny_target"),
    out: Annotated[Path, typer.Option(help="Folder for logs, checkpoints and the curve; emptied first.")] = Path(
        "demo"
    ),
    minutes: Annotated[float, typer.Option(min=0.5, help="Time that the draft is given to learn.")] = 5.0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Show the acceptance length rise on a real server; exit code 1 unless it rises by half."""
    if not (model / "config.json").exists():
        console.print(f"[red]error: {model} holds no model; run this from the checkout, or give --model")
        raise typer.Exit(2)
    if out.exists() and not (out / ".demo").exists() and any(out.iterdir()):
        console.print(f"[red]error: {out} is not a folder of an earlier demo and not empty; give another --out")
        raise typer.Exit(2)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        passed = asyncio.run(_demo(model, out, 60 * minutes, tp, device))
    except ServerFailed as error:
        console.print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("stopped; everything the demo started is gone")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if passed else 1)


async def _demo(model: Path, out: Path, learn_s: float, tp: int, device: str) -> bool:
    serving = [*SERVING, "--model-path", model, "--served-model-name", "default"]
    training = [part for name, value in TRAINING.items() for part in (f"--draft-training-{name}", value)]
    training += ["--enable-draft-training", "--draft-training-run-dir", out / "run"]

    console.print("starting a server without speculation, to compare with")
    with ServerProcess.start(out / "plain.log", serving, device=device, tp=tp) as server, _driving(server) as tally:
        await asyncio.sleep(_WINDOW_S)
        plain_tokens_per_s, failures = tally.tokens_per_s, list(tally.failures)

    console.print("starting a server with draft training and a random draft")
    looks: list[Look] = []
    with (
        ServerProcess.start(out / "server.log", [*serving, *training], device=device, tp=tp) as server,
        _driving(server) as tally,
    ):
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while tally_s(tally) < learn_s:
                await asyncio.sleep(_LOOK_EVERY_S)
                status = await asyncio.to_thread(server.status)
                looks.append(Look.at(tally_s(tally), status, tally))
                live.update(Group(status_view.render(status), _progress(looks, tally, learn_s)), refresh=True)
                if not console.is_terminal and len(looks) % 10 == 1:
                    console.print(_line(looks))
        failures += tally.failures
    _plot(looks, out / "acceptance.png")
    return _report(looks, status, plain_tokens_per_s, failures, out)


def tally_s(tally: traffic.Tally) -> float:
    return time.monotonic() - tally.started_s


@contextlib.contextmanager
def _driving(server: ServerProcess) -> Iterator[traffic.Tally]:
    """Requests keep flowing for as long as the body runs."""
    tally = traffic.Tally()
    task = asyncio.create_task(traffic.drive(server.url, traffic.stream_prompts(seed=0), tally, **_TRAFFIC))
    try:
        yield tally
    finally:
        task.cancel()


def _acceptance(first: Look, last: Look) -> float:
    passes = last.passes - first.passes
    return (last.committed - first.committed) / passes if passes else float("nan")


def _at(looks: list[Look], s: float) -> Look:
    return next((look for look in looks if look.s >= s), looks[-1])


def _before_and_after(looks: list[Look]) -> tuple[tuple[Look, Look], tuple[Look, Look]]:
    """The looks that bound version 0's time, and the last window's."""
    last_of_first = [look for look in looks if look.version == looks[0].version][-1]
    return (looks[0], last_of_first), (_at(looks, looks[-1].s - _WINDOW_S), looks[-1])


def _tokens_per_s(first: Look, last: Look) -> float:
    return (last.completion_tokens - first.completion_tokens) / max(1e-9, last.s - first.s)


def _progress(looks: list[Look], tally: traffic.Tally, learn_s: float) -> Table:
    recent = _at(looks, looks[-1].s - _WINDOW_S)
    table = Table(show_header=False, title="traffic")
    table.add_row("time", f"{looks[-1].s:.0f} of {learn_s:.0f} s")
    table.add_row(f"acceptance length, last {_WINDOW_S:.0f} s", f"{_acceptance(recent, looks[-1]):.2f}")
    table.add_row(f"tokens/s, last {_WINDOW_S:.0f} s", f"{_tokens_per_s(recent, looks[-1]):.0f}")
    table.add_row("requests", f"{tally.requests}, {len(tally.failures)} failed")
    return table


def _line(looks: list[Look]) -> str:
    recent = _at(looks, looks[-1].s - _WINDOW_S)
    return (
        f"{looks[-1].s:4.0f} s  acceptance length {_acceptance(recent, looks[-1]):.2f}  version {looks[-1].version}  "
        f"{looks[-1].trained} tokens trained  {_tokens_per_s(recent, looks[-1]):.0f} tokens/s"
    )


def _plot(looks: list[Look], file: Path) -> None:
    points = [(look.s, _acceptance(_at(looks, look.s - _WINDOW_S / 2), look)) for look in looks[2:]]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*points, strict=True), linewidth=2)
    for before, after in zip(looks, looks[1:], strict=False):
        if after.version != before.version:
            axes.axvline(after.s, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(f"v{after.version}", (after.s, 1), xycoords=("data", "axes fraction"), fontsize=7)
    axes.set(xlabel="seconds of traffic", ylabel="acceptance length (tokens per verify step)", ylim=(0.9, None))
    axes.set_title("Acceptance length while the server serves; dotted: a new draft version", fontsize=10, pad=14)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _report(
    looks: list[Look], status: dict[str, Any], plain_tokens_per_s: float, failures: list[str], out: Path
) -> bool:
    before, after = _before_and_after(looks)
    rise = _acceptance(*after) / _acceptance(*before)
    table = Table(title="demo")
    for column in ("", "before", "after", "no speculation"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("acceptance length", f"{_acceptance(*before):.2f}", f"{_acceptance(*after):.2f}", "1.00")
    table.add_row(
        "tokens/s", f"{_tokens_per_s(*before):.0f}", f"{_tokens_per_s(*after):.0f}", f"{plain_tokens_per_s:.0f}"
    )
    console.print(table)
    console.print(f"requests failed: {len(failures)}   swaps: {status['draft']['swaps']}   curve: {out}/acceptance.png")
    if failures:
        console.print(f"first failure: {failures[0]}", style="red")
    passed = rise >= _RISE and not failures
    console.print(f"acceptance length x {rise:.2f}: {'as it should' if passed else 'the demo failed'}")
    return passed


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
