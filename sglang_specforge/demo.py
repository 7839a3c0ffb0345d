"""``make demo``: a server with a random draft gets better at speculation while requests keep flowing.

The same traffic is measured against a server without speculation first, then against one with draft training.
"""

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from sglang_specforge import status_view, traffic
from sglang_specforge.demo_curve import WINDOW_S, Curve, Look
from sglang_specforge.server_process import ServerFailed, ServerProcess

console = Console()

LOOK_EVERY_S = 2.0
_TRAFFIC = {"concurrency": 8, "max_tokens": 128, "temperature": 0.0}
_RISE = 1.5  # acceptance after, over before, that the demo has to show

SERVING = (
    "--dtype", "float32", "--max-total-tokens", 32768, "--max-running-requests", 16, "--random-seed", 0,
    "--log-level", "warning", "--served-model-name", "default",
)  # fmt: skip
TRAINING = (
    "--enable-draft-training", "--draft-training-publish-every-s", 20, "--draft-training-learning-rate", 2e-3,
    "--draft-training-warmup-steps", 20, "--draft-training-ttt-steps", 3, "--draft-training-loss-on", "all",
    "--draft-training-batch-tokens", 1024, "--draft-training-epochs-per-token", 16,
)  # fmt: skip


def run_demo(
    model: Annotated[Path, typer.Option(help="Target to serve.")] = Path("examples/tiny_target"),
    out: Annotated[Path, typer.Option(help="Folder for logs and the curve; emptied first.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.5, help="Time that the draft is given to learn.")] = 5.0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Show the acceptance length rise on a real server; exit code 1 unless it rises by half."""
    if not (model / "config.json").exists():
        _refuse(f"{model} holds no model; run this from the checkout, or give --model")
    if out.exists() and any(out.iterdir()) and not (out / ".demo").exists():
        _refuse(f"{out} is not empty and not of an earlier demo; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    serving, where = ["--model-path", model, *SERVING], {"device": device, "tp": tp}
    console.print("starting a server without speculation, to compare with")
    with ServerProcess.start(out / "plain.log", serving, **where) as server:
        async with driving(server, traffic.Tally()) as plain:
            await asyncio.sleep(WINDOW_S)
            plain_tokens_per_s = plain.tokens_per_s

    console.print("starting a server with draft training and a random draft")
    training = [*serving, *TRAINING, "--draft-training-run-dir", out / "run", "--draft-training-trainer-device", device]
    curve = Curve()
    with ServerProcess.start(out / "server.log", training, **where) as server:
        async with driving(server, traffic.Tally()) as tally:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while tally.elapsed_s < learn_s:
                    await asyncio.sleep(LOOK_EVERY_S)
                    status = await asyncio.to_thread(server.status)
                    curve.looks.append(Look.at(status, tally))
                    live.update(Group(status_view.render(status), curve.table(tally, learn_s)), refresh=True)
                    if not console.is_terminal and len(curve.looks) % 10 == 1:
                        console.print(curve.line())
    curve.plot(out / "acceptance.png")
    return _report(curve, status, plain_tokens_per_s, plain.failures + tally.failures, out)


@contextlib.asynccontextmanager
async def driving(
    server: ServerProcess, tally: traffic.Tally, family: traffic.Family | None = None
) -> AsyncIterator[traffic.Tally]:
    """Requests keep flowing for as long as the body runs."""
    prompts = traffic.stream_prompts(seed=0, family=family)
    task = asyncio.create_task(traffic.drive(server.url, prompts, tally, **_TRAFFIC))
    try:
        yield tally
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _report(curve: Curve, status: dict[str, Any], plain_tokens_per_s: float, failures: list[str], out: Path) -> bool:
    before, after = curve.first_version, curve.now
    table = Table(title="demo")
    for column in ("", "before", "after", "no speculation"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("acceptance length", f"{before.acceptance_length:.2f}", f"{after.acceptance_length:.2f}", "1.00")
    table.add_row("tokens/s", f"{before.tokens_per_s:.0f}", f"{after.tokens_per_s:.0f}", f"{plain_tokens_per_s:.0f}")
    console.print(table)
    console.print(f"requests failed: {len(failures)}   swaps: {status['draft']['swaps']}   curve: {out}/acceptance.png")
    if failures:
        console.print(f"first failure: {failures[0]}", style="red", highlight=False)
    rise = after.acceptance_length / before.acceptance_length
    passed = rise >= _RISE and not failures
    console.print(f"acceptance length x {rise:.2f}: {'passed' if passed else 'failed'} (x {_RISE} and no failure)")
    return passed


def _refuse(message: str) -> None:
    console.print(f"error: {message}", style="red", highlight=False)
    raise typer.Exit(2)
