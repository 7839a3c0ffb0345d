"""``sglang-specforge``: making drafts, watching a server, driving traffic at it, and the demo."""

import ast
import asyncio
import importlib.util
import time
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.live import Live
from typer.core import TyperCommand, TyperGroup

from sglang_specforge import status_view, traffic, versions_cli
from sglang_specforge.ab.cli import app as ab_app
from sglang_specforge.client import COPY_LIMIT_S, DEFAULT_URL, ApiKey, GeneratingKey, Url, ask, fail, opened, or_fail

_COMMANDS = "sglang_specforge.commands"  # entry points; the trainer adds its own, as nothing here imports it
_SLOW = {
    "init-draft": "sglang_specforge.new_draft_cli:init_draft",
    "prepare-data": "sglang_specforge.prepare.cli:prepare_data",
    "demo": "sglang_specforge.demo:run_demo",
}


class _Commands(TyperGroup):
    """Those here, and those whose modules need seconds: these are loaded when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_slow_commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        slow = _slow_commands().get(cmd_name)
        return _LoadedWhenAsked(slow) if slow else super().get_command(ctx, cmd_name)


class _LoadedWhenAsked(TyperCommand):
    """Its line in ``--help`` is read in its source."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(entry.name, help=_docstring(entry))
        self._entry = entry

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        one = typer.Typer(add_completion=False)
        one.command(self.name)(self._entry.load())
        return typer.main.get_command(one).make_context(*args, **kwargs)


def _slow_commands() -> dict[str, EntryPoint]:
    own = (EntryPoint(name, where, _COMMANDS) for name, where in _SLOW.items())
    return {entry.name: entry for entry in (*own, *entry_points(group=_COMMANDS))}


def _docstring(entry: EntryPoint) -> str | None:
    spec = importlib.util.find_spec(entry.module)
    source = ast.parse(Path(spec.origin).read_bytes()).body if spec and spec.origin else []
    functions = (part for part in source if isinstance(part, ast.FunctionDef) and part.name == entry.attr)
    return next(map(ast.get_docstring, functions), None)


app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, cls=_Commands)
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
    """Put a draft checkpoint into the live server, for its trainer to go on from where it is better."""
    if upload:
        with or_fail(), opened(checkpoint) as files:
            answer = ask("POST", url, "/draft/versions", api_key, files=files, timeout=COPY_LIMIT_S)
    else:
        path = str(checkpoint.absolute())
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
