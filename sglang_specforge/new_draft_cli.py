"""``sglang-specforge init-draft``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.client import fail
from sglang_specforge.new_draft import RECIPES, Recipe, coverage
from sglang_specforge.new_draft import init_draft as write_draft
from sglang_specforge.prepared import PreparedError, PreparedFile
from sglang_specforge.target import TargetError, load_target_config, resolve_target

console = Console()


def init_draft(
    target: Annotated[str, typer.Argument(help="Folder or Hugging Face name of the target.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the draft.")],
    draft_vocab_size: Annotated[int, typer.Option(min=8, help="Largest draft vocabulary.")] = 32_000,
    dtype: Annotated[str, typer.Option(help="auto (as the target), bfloat16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    recipe: Annotated[Recipe, typer.Option(help="Kind of draft.")] = "eagle3",
    counts_from: Annotated[
        Path | None, typer.Option(help="File of prepare-data: the draft vocabulary is its most frequent tokens.")
    ] = None,
) -> None:
    """Write a random EAGLE3 draft for a target, ready for --speculative-draft-model-path."""
    if dtype not in ("auto", "bfloat16", "float32"):
        fail(f"--dtype {dtype} is not accepted; give auto, bfloat16 or float32")
    if (out / "config.json").exists():
        fail(f"{out} holds a checkpoint already; give another folder or remove it")
    try:
        counts_V = PreparedFile(counts_from).count_tokens(_vocab_size(target)) if counts_from else None
        chosen = {"counts_V": counts_V, "variant": RECIPES[recipe]}
        write_draft(target, out, draft_vocab_size=draft_vocab_size, dtype=dtype, seed=seed, **chosen)
    except (TargetError, CheckpointError, PreparedError, OSError) as error:
        fail(str(error))
    if counts_V is not None:
        console.print(coverage(counts_V, draft_vocab_size))
    console.print(f"wrote {out}")


def _vocab_size(target: str) -> int:
    return load_target_config(resolve_target(target)).vocab_size
