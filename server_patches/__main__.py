"""``python -m server_patches check``: do the seams hold in the SGLang that is installed, or in another version?"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from server_patches.sources import Sources
from server_patches.targets import Imported, View, difference

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(soft_wrap=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def check(
    version: Annotated[
        str | None, typer.Option("--sglang", help="Another version: its wheel is downloaded and read, not installed.")
    ] = None,
    wheel: Annotated[Path | None, typer.Option(help="A wheel of SGLang that is there already.")] = None,
) -> None:
    """Print each seam, what ours does there, and whether it holds; exit with 1 where one does not."""
    with tempfile.TemporaryDirectory() as folder:
        if version:
            wheel = _download(version, Path(folder))
        view = Sources.of_wheel(wheel) if wheel else Imported()
        raise typer.Exit(_report(view, wheel.name if wheel else "the installed sglang"))


def _report(view: View, what: str) -> int:
    from server_patches.v0_5_23 import SUPPORTED, TARGETS

    table = Table(title=f"seams of {SUPPORTED} in {what}")
    for column in ("holds", "seam", "use"):
        table.add_column(column, overflow="fold")
    problems = []
    for seam in TARGETS:
        problem = difference(seam, view)
        problems += [problem] if problem else []
        table.add_row("no" if problem else "yes", seam.path, seam.use)
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    console.print(f"{len(TARGETS) - len(problems)} of {len(TARGETS)} seams hold")
    return 1 if problems else 0


def _download(version: str, folder: Path) -> Path:
    """Exits with 2 where there is no such version."""
    wanted = "sglang" if version == "newest" else f"sglang=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, wanted], capture_output=True, text=True)
    if done.returncode:
        console.print(f"{wanted} cannot be downloaded:\n{done.stderr.strip()}", markup=False)
        raise typer.Exit(2)
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    app()
