"""``sglang-specforge``: making drafts, watching a server, driving traffic at it, and the demo."""

import asyncio
import importlib.metadata
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from sglang_specforge import status_view, traffic, versions_cli
from sglang_specforge.ab.cli import app as ab_app
from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.client import DEFAULT_URL, ApiKey, Url, ask, fail
from sglang_specforge.demo import run_demo
from sglang_specforge.new_draft import RECIPES, Recipe, coverage
from sglang_specforge.new_draft import init_draft as write_draft
from sglang_specforge.prepare.cli import prepare_data
from sglang_specforge.prepared import PreparedError, PreparedFile
from sglang_specforge.target import TargetError, load_target_config, resolve_target

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
_COMMANDS = "sglang_specforge.commands"  # entry points; the trainer adds its own, as nothing here imports it


@app.command()
def init_draft(
    target: Annotated[str, typer.Argument(help="Folder or Hugging Face name of the target.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the draft.")],
    draft_vocab_size: Annotated[int, typer.Option(min=8, help="Largest draft vocabulary.")] = 32_000,
    dtype: Annotated[str, typer.Option(help="auto (as the target), bfloat16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    recipe: Annotated[Recipe, typer.Option(help="Kind of draft.")] = "eagle3",
    counts_from: Annotated[
        Path | None, typer.Option(help="File of prepare-data: the draft vocabulary is its most frequent tokens.")
    ] = None,
) -> None:
    """Write a random EAGLE3 draft for a target, ready for --speculative-draft-model-path."""
    if dtype not in ("auto", "bfloat16", "float32"):
        fail(f"--dtype {dtype} is not accepted; give auto, bfloat16 or float32")
    if (out / "config.json").exists():
        fail(f"{out} holds a checkpoint already; give another folder or remove it")
    try:
        counts_V = PreparedFile(counts_from).count_tokens(_vocab_size(target)) if counts_from else None
        chosen = {"counts_V": counts_V, "variant": RECIPES[recipe]}
        write_draft(target, out, draft_vocab_size=draft_vocab_size, dtype=dtype, seed=seed, **chosen)
    except (TargetError, CheckpointError, PreparedError, OSError) as error:
        fail(str(error))
    if counts_V is not None:
        console.print(coverage(counts_V, draft_vocab_size))
    console.print(f"wrote {out}")


@app.command()
def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    watch: Annotated[bool, typer.Option(help="Keep showing it until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Show what the server's draft training is doing."""
    if json:
        console.print_json(data=_fetch_status(url, api_key))
        return
    if not watch:
        console.print(status_view.render(_fetch_status(url, api_key)))
        return
    try:
        with Live(status_view.render(_fetch_status(url, api_key)), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                live.update(status_view.render(_fetch_status(url, api_key)), refresh=True)
    except KeyboardInterrupt:
        pass


@app.command()
def swap(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the draft checkpoint, on the server's disk.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Put a draft checkpoint into the live server. A trainer's better version replaces it."""
    answer = ask("POST", url, "/draft/versions", api_key, json={"path": str(checkpoint.absolute())}, timeout=180)
    console.print(f"version {answer.json()['version']} is active")


@app.command("traffic")
def drive_traffic(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    requests: Annotated[int, typer.Option(min=1, help="How many to send.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which prompts: lines of the Python standard library.")] = 0,
) -> None:
    """Drive varied chat requests at a server; exit code 1 if any failed."""
    tally = traffic.Tally()
    settings = {"concurrency": concurrency, "max_tokens": max_tokens, "temperature": temperature}
    prompts = traffic.stream_prompts(seed)
    asyncio.run(traffic.drive(url, prompts, tally, requests=requests, api_key=api_key, **settings))
    console.print(
        f"{tally.requests} requests, {len(tally.failures)} failed, {tally.completion_tokens} tokens, "
        f"{tally.tokens_per_s:.1f} tokens/s"
    )
    if tally.failures:
        fail(f"first failure: {tally.failures[0]}", code=1)


app.command("demo")(run_demo)
app.command()(prepare_data)
for _command in (versions_cli.versions, versions_cli.activate, versions_cli.rollback, versions_cli.gate):
    app.command()(_command)
app.command()(versions_cli.events)
app.add_typer(ab_app, name="ab")
for _command in importlib.metadata.entry_points(group=_COMMANDS):
    app.command(_command.name)(_command.load())


def _vocab_size(target: str) -> int:
    return load_target_config(resolve_target(target)).vocab_size


def _fetch_status(url: str, api_key: str | None) -> dict:
    return ask("GET", url, "/draft/status", api_key, timeout=10).json()
