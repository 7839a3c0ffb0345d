"""``python -m server_patches check``: do the seams hold in the SGLang that is installed, or in another version?"""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
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
    wheel: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A wheel of SGLang that is there already.")
    ] = None,
) -> None:
    """Print each seam, what ours does there, and whether it holds; exit with 1 where one does not."""
    from server_patches.supported import installed, support_of

    with tempfile.TemporaryDirectory() as folder:
        if version:
            wheel = _download(version, Path(folder))
        if wheel:
            support = support_of(_version_of(wheel))
            raise typer.Exit(_report(support, Sources.of_wheel(wheel), wheel.name))
    raise typer.Exit(_report(installed(), Imported(), "the installed sglang"))


def _report(support: ModuleType, view: View, what: str) -> int:
    table = Table(title=f"seams of sglang {support.VERSION} in {what}")
    for column in ("holds", "seam", "use"):
        table.add_column(column, overflow="fold")
    problems = []
    for seam in support.TARGETS:
        problem = difference(seam, view)
        problems += [problem] if problem else []
        table.add_row("no" if problem else "yes", seam.path, seam.use)
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    console.print(f"{len(support.TARGETS) - len(problems)} of {len(support.TARGETS)} seams hold")
    return 1 if problems else 0


def _version_of(wheel: Path) -> str:
    """Exits with 2 where the file's name is not a wheel's."""
    try:
        return str(parse_wheel_filename(wheel.name)[1])
    except InvalidWheelFilename as error:
        console.print(f"{wheel.name} is no wheel: {error}", markup=False)
        raise typer.Exit(2) from error


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
