"""Commands that show and change which draft a live server uses."""

import json as jsonlib
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import DEFAULT_URL, ApiKey, Url, ask
from sglang_specforge.manifest import Drafting, Mode

Why = Annotated[str, typer.Option(help="Reason, for the audit log.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")]
console = Console()
_LIMIT_S = 180  # of loading a version


def versions(url: Url = DEFAULT_URL, api_key: ApiKey = None, json: AsJson = False) -> None:
    """List the draft versions: which are active or resident, and the acceptance length of each on live traffic."""
    found = ask("GET", url, "/draft/versions", api_key, timeout=30).json()
    if json:
        console.print_json(data=found)
        return
    table = Table("version", "", "acceptance length", "verifications", "sha256", "path")
    for one in found:
        state = "active" if one["active"] else "refused" if one["refused"] else "resident" if one["resident"] else ""
        seen = one["acceptance"] or {"length": None, "passes": 0}
        length = "-" if seen["length"] is None else f"{seen['length']:.3f}"
        content = (one["sha256"] or "")[:12]
        table.add_row(str(one["version"]), state, length, f"{seen['passes']:,}", content, one["path"])
    console.print(table)


def activate(
    version: Annotated[int, typer.Argument(min=0, help="Number of a version.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    why: Why = "",
) -> None:
    """Put a version into service, on all ranks or on none."""
    _say(ask("POST", url, "/draft/activate", api_key, json={"version": version, "why": why}, timeout=_LIMIT_S).json())


def rollback(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    to: Annotated[int | None, typer.Option(min=0, help="Version; left out: what was active before.")] = None,
    why: Why = "",
) -> None:
    """Go back to an earlier version. What the trainer publishes then waits, until `gate auto`."""
    _say(ask("POST", url, "/draft/rollback", api_key, json={"to": to, "why": why}, timeout=_LIMIT_S).json())
    console.print("what the trainer publishes waits; `sglang-specforge gate auto` lets it go live again")


def gate(
    mode: Annotated[Mode, typer.Argument(help="auto: better ones go live. propose: they wait. off: all go live.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    why: Why = "",
) -> None:
    """Choose what becomes of versions that the trainer publishes."""
    _set_mode("gate", mode, url, api_key, why)


def drafting(
    mode: Annotated[Drafting, typer.Argument(help="auto: while it makes answers faster. always. never.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    why: Why = "",
) -> None:
    """Choose whether steps draft, of a server that was started with --draft-drafting auto or never."""
    _set_mode("drafting", mode, url, api_key, why)


def events(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    json: AsJson = False,
) -> None:
    """Show the audit log: every change of the served draft, who made it and why."""
    found = ask("GET", url, "/draft/events", api_key, params={"last": last}, timeout=30).json()
    if json:
        console.print_json(data=found)
        return
    table = Table("time", "event", "who", "what")
    for event in found:
        facts = {key: value for key, value in event.items() if key not in ("time", "event", "who") and value != ""}
        said = ", ".join(f"{key} {jsonlib.dumps(value)}" for key, value in facts.items())
        table.add_row(event["time"], event["event"], event["who"], said)
    console.print(table)


def _set_mode(what: str, mode: str, url: str, api_key: str | None, why: str) -> None:
    ask("POST", url, f"/draft/{what}", api_key, json={"mode": mode, "why": why}, timeout=30)
    console.print(f"{what}: {mode}")


def _say(activated: dict[str, Any]) -> None:
    if activated["changed"]:
        console.print(f"version {activated['version']} is active, in place of {activated['before']}")
    else:
        console.print(f"version {activated['version']} is active already")
