"""Benchmarks run, and by one command line: what STYLE.md calls their shape."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

FOLDER = Path(__file__).parents[1] / "benchmarks"
BENCHMARKS = sorted(p.stem for p in FOLDER.glob("*.py") if "__main__" in p.read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_with_nothing_but_quick_and_a_file_for_its_figures(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    app = typer.Typer()
    app.command()(importlib.import_module(name).main)
    command = typer.main.get_command(app)
    options = {option: p for p in command.params for option in p.opts}
    assert {"--quick", "--json"} <= options.keys()
    assert options["--quick"].is_flag
    assert not [p.name for p in command.params if p.required]


# Without a server, and done within a minute; the others are slow.
QUICK_ENOUGH = ("ab_simulation", "chain_sampling")


@pytest.mark.parametrize(
    "name", [name if name in QUICK_ENOUGH else pytest.param(name, marks=pytest.mark.slow) for name in BENCHMARKS]
)
def test_every_benchmark_runs_to_its_end(name, tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, FOLDER / f"{name}.py", "--quick", "--json", record]
    done = subprocess.run(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 2 and "it is made by" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(math.isfinite(ratio) for ratio in json.loads(record.read_text())["ratios"].values())
