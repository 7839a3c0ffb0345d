"""The wheels, installed in a folder that goes before the machine's own packages, which stay as they are."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import typer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WHEELS, SITE, PEER = HERE / "wheels", HERE / ".site", ROOT / "benchmarks" / ".peer"


def make_site() -> None:
    """Exits with 2 where there are no wheels, or where one does not fit this Python."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        print(f"no wheels in {WHEELS}; run benchmarks/gpu/collect.py where there is a package index, and bring them")
        raise typer.Exit(2)
    peers = [wheel for wheel in wheels if wheel.name.startswith("specforge-")]
    _install([wheel for wheel in wheels if wheel not in peers], SITE)
    if not PEER.exists():
        _install(peers, PEER)
    _describe_ours()


def environment() -> dict[str, str]:
    """Of a process that sees the folder and the checkout."""
    return {**os.environ, "PYTHONPATH": f"{SITE}:{ROOT}", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _install(wheels: list[Path], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
    if subprocess.run([*command, *wheels]).returncode:  # pip has said why
        shutil.rmtree(folder, ignore_errors=True)
        raise typer.Exit(2)


def _describe_ours() -> None:
    """SGLang finds plugins by their entry points: those of the checkout, without building it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    folder = SITE / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    with (folder / "entry_points.txt").open("w") as file:
        for group, named in groups.items():
            file.write("\n".join([f"[{group}]", *(f"{key} = {where}" for key, where in named.items()), ""]))
