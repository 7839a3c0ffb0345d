"""``sglang-specforge``: making drafts, watching a server, driving traffic at it, and the demo."""

import asyncio
import importlib.metadata
import pkgutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.live import Live
from typer.core import TyperGroup

from sglang_specforge import status_view, traffic, versions_cli
from sglang_specforge.ab.cli import app as ab_app
from sglang_specforge.client import DEFAULT_URL, ApiKey, GeneratingKey, Url, ask, fail, or_fail, upload_checkpoint

_COMMANDS = "sglang_specforge.commands"  # entry points; the trainer adds its own, as nothing here imports it
_SLOW = {
    "init-draft": "sglang_specforge.new_draft_cli:init_draft",
    "prepare-data": "sglang_specforge.prepare.cli:prepare_data",
    "demo": "sglang_specforge.demo:run_demo",
}


class _LoadedWhenAsked(TyperGroup):
    """Commands whose modules need seconds are loaded when they are asked for, and for ``--help``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_slow_commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (load := _slow_commands().get(cmd_name)) is None:
            return super().get_command(ctx, cmd_name)
        one = typer.Typer(add_completion=False)
        one.command(cmd_name)(load())
        return typer.main.get_command(one)


def _slow_commands() -> dict[str, Callable[[], Callable[..., None]]]:
    own = {name: partial(pkgutil.resolve_name, where) for name, where in _SLOW.items()}
    return own | {entry.name: entry.load for entry in importlib.metadata.entry_points(group=_COMMANDS)}


app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, cls=_LoadedWhenAsked)
console = Console()


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
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the draft checkpoint.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    upload: Annotated[bool, typer.Option(help="It is on this machine, not on the server's disk.")] = False,
) -> None:
    """Put a draft checkpoint into the live server. A trainer's better version replaces it."""
    path = str(checkpoint.absolute())
    if upload:
        with or_fail():
            path = upload_checkpoint(url, api_key, checkpoint)
    answer = ask("POST", url, "/draft/versions", api_key, json={"path": path}, timeout=180)
    console.print(f"version {answer.json()['version']} is active")


@app.command("traffic")
def drive_traffic(
    url: Url = DEFAULT_URL,
    api_key: GeneratingKey = None,
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
    with or_fail():
        asyncio.run(traffic.drive(url, prompts, tally, requests=requests, api_key=api_key, **settings))
    console.print(
        f"{tally.requests} requests, {len(tally.failures)} failed, {tally.completion_tokens} tokens, "
        f"{tally.tokens_per_s:.1f} tokens/s"
    )
    if tally.failures:
        fail(f"first failure: {tally.failures[0]}", code=1)


for _name in ("versions", "activate", "rollback", "gate", "drafting", "events"):
    app.command()(getattr(versions_cli, _name))
app.add_typer(ab_app, name="ab")


def _fetch_status(url: str, api_key: str | None) -> dict:
    return ask("GET", url, "/draft/status", api_key, timeout=10).json()
