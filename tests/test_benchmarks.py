"""Benchmarks are run by one command line: what STYLE.md calls their shape."""

import importlib
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
