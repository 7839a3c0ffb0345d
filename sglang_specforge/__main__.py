"""``python -m sglang_specforge``: the command line."""

from sglang_specforge.cli import app

app()
