"""``sglang-specforge evaluate``: what a draft checkpoint would have committed on stored sequences."""

from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.client import fail
from sglang_specforge.target import TargetError, fingerprint_target
from sglang_specforge.training_settings import Job, TrainingSettings
from trainer.evaluate import Simulated, Way, simulate
from trainer.learner import load_draft, load_target
from trainer.offline.layout import DatasetError
from trainer.offline.reader import StoredSamples
from trainer.offline.source import Split

console = Console()


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the draft.")],
    data: Annotated[Path, typer.Option(help="Folder that capture wrote.")],
    target: Annotated[Path | None, typer.Option(help="Folder of the target, unless the data's is still there.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Drafts of a chain.")] = 3,
    holdout_every: Annotated[int, typer.Option(min=1, help="As in training: these samples are used. 1: all.")] = 20,
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Acceptance length of a draft by simulation on held-out stored data: greedy, and at temperature 1."""
    try:
        samples = StoredSamples(data, None if target is None else fingerprint_target(target))
        job = Job(
            settings=TrainingSettings(),
            target_path=str(target or samples.manifest.target_path),
            target_fingerprint=samples.manifest.target_fingerprint,
            draft_path=str(checkpoint),
            served_dtype=samples.manifest.served_dtype,
            draft_steps=steps,
        )
        dtype, place = getattr(torch, job.served_dtype), torch.device(device)
        draft, frozen = load_draft(job, checkpoint).to(place, dtype), load_target(job, dtype, place)
        entries = Split.of(samples.entries, holdout_every).held_out[:limit]
        held_out = [sample for entry in entries if (sample := samples.load(entry)) is not None]
        found = {way: simulate(draft, frozen, held_out, steps, way) for way in get_args(Way)}
    except (CheckpointError, DatasetError, TargetError) as error:
        fail(str(error))
    if json:
        console.print_json(data={way: _facts(simulated) for way, simulated in found.items()})
    else:
        console.print(_table(found, steps))


def _facts(simulated: Simulated) -> dict[str, Any]:
    return {
        "acceptance_length": simulated.length,
        "by_position": simulated.by_position,
        "sequences": simulated.sequences,
        "tokens": simulated.tokens,
    }


def _table(found: dict[Way, Simulated], steps: int) -> Table:
    table = Table(title="acceptance by simulation")
    for column in ("", "length", *(f"draft {k + 1}" for k in range(steps)), "tokens"):
        table.add_column(column)
    for way, simulated in found.items():
        length = "-" if simulated.length is None else f"{simulated.length:.3f}"
        table.add_row(way, length, *(f"{share:.3f}" for share in simulated.by_position), f"{simulated.tokens:,}")
    return table
