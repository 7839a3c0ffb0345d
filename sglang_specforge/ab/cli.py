"""``sglang-specforge ab``: starting, watching and ending comparisons of drafts on a live server."""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
from rich.console import Console
from rich.live import Live

from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.report import Report
from sglang_specforge.ab.servers import Servers, compare_servers
from sglang_specforge.ab.view import render, write_page
from sglang_specforge.client import DEFAULT_URL, ApiKey, Url, ask, fail, or_fail, writable

app = typer.Typer(help="Compare drafts on live traffic, by turns, until it is settled.", no_args_is_help=True)
console = Console()
_LOOK_EVERY_S = 1.0


Html = Annotated[Path | None, typer.Option(help="Also write a page with the curves to this file.", callback=writable)]
Record = Annotated[
    Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.", callback=writable)
]
Id = Annotated[str, typer.Argument(help="Number of the A/B.")]


@app.command()
def start(
    a: Annotated[str, typer.Option(help="First arm: active, a version's number, or a checkpoint's folder.")] = "active",
    b: Annotated[list[str], typer.Option(help="Another arm; may be repeated.")] = ...,
    url: Annotated[
        list[str],
        typer.Option(
            "--url",
            "--server",
            help="Address of the server. Repeated: servers that show the arms side by side, led from here.",
        ),
    ] = (DEFAULT_URL,),
    api_key: ApiKey = None,
    window_s: Annotated[float, typer.Option(help="Shortest turn of an arm, in seconds.")] = 5.0,
    min_passes: Annotated[int, typer.Option(help="Verifications of a request that a turn has to see.")] = 50,
    smallest_difference: Annotated[float, typer.Option(help="Relative; below it, arms count as alike.")] = 0.02,
    alpha: Annotated[float, typer.Option(help="Probability of ever finding a difference between equals.")] = 0.05,
    max_blocks: Annotated[int, typer.Option(help="Turns of each arm after which it ends undecided.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Of the order within each block.")] = None,
    promote: Annotated[bool, typer.Option(help="Activate the winner.")] = False,
    wait: Annotated[bool, typer.Option(help="Watch it until it ends.")] = False,
    html: Html = None,
    record: Record = None,
) -> None:
    """Begin a comparison. With --wait (or a file for what comes out of it): exit code 0 when it is settled, 1 when not.

    One of several servers is led from here until it ends, and stopped by Ctrl-C; checkpoints are copied to each.
    """
    settings = {
        "window_s": window_s, "min_passes": min_passes, "smallest_difference": smallest_difference, "alpha": alpha,
        "max_blocks": max_blocks, "promote": promote, **({} if seed is None else {"seed": seed}),
    }  # fmt: skip
    try:
        if len(url) > 1:
            report = _lead(url, api_key, [a, *b], settings)
        else:
            plan = Plan(arms=[_arm(given, url[0], api_key) for given in (a, *b)], **settings)
            report = _report(ask("POST", url[0], "/draft/ab", api_key, json=plan.model_dump(), timeout=180))
            console.print(f"A/B {report.id} began: versions {', '.join(str(arm.version) for arm in report.arms)}")
            if not (wait or html or record):
                return
            report = _watch(report.id, url[0], api_key)
    except pydantic.ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()))
    _show(report, html)
    if record is not None:
        record.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.outcome in ("better", "worse", "alike") else 1)


@app.command()
def show(
    id: Id,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    html: Html = None,
    json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Show what a comparison knows."""
    answer = ask("GET", url, f"/draft/ab/{id}", api_key, timeout=30)
    if json:
        console.print_json(data=answer.json())
    else:
        _show(_report(answer), html)


@app.command()
def stop(id: Id, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """End a comparison: what was active before is active again."""
    _show(_report(ask("DELETE", url, f"/draft/ab/{id}", api_key, timeout=60)), None)


@app.command("list")
def list_all(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List every comparison of the run folder."""
    for one in ask("GET", url, "/draft/ab", api_key, timeout=30).json():
        versions = ", ".join(str(arm["version"]) for arm in one["arms"])
        console.print(f"{one['id']}: versions {versions}: {one['state']} {one['why']}".rstrip())


def _arm(given: str, url: str, api_key: str | None) -> int | str:
    """A version's number, or active; a checkpoint becomes a version."""
    if given == "active" or given.isdigit():
        return given if given == "active" else int(given)
    body = {"path": str(Path(given).absolute()), "activate": False}
    return ask("POST", url, "/draft/versions", api_key, json=body, timeout=180).json()["version"]


def _watch(id: str, url: str, api_key: str | None) -> Report:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (report := _report(ask("GET", url, f"/draft/ab/{id}", api_key, timeout=30))).state == "running":
            live.update(render(report), refresh=True)
            time.sleep(_LOOK_EVERY_S)
    return report


def _lead(urls: list[str], api_key: str | None, arms: list[str], settings: dict[str, Any]) -> Report:
    with Live(console=console, auto_refresh=False, transient=True) as live, or_fail():
        servers = Servers(urls, api_key)
        leading = compare_servers(servers, arms, settings, lambda now: live.update(render(now), refresh=True))
        return asyncio.run(leading)


def _report(answer: Any) -> Report:
    return Report.model_validate_json(answer.content)


def _show(report: Report, html: Path | None) -> None:
    console.print(render(report))
    if html is not None:
        write_page(report, html)
        console.print(f"page: {html}")
