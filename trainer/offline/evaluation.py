"""``sglang-specforge evaluate``: what a draft checkpoint would have committed on stored sequences."""

from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from sglang_specforge.client import fail
from sglang_specforge.target import fingerprint_target
from sglang_specforge.training_settings import Job, Speculation, TrainingSettings
from trainer.evaluate import Simulated, Way, by_slice, simulate
from trainer.learner import load_draft, load_target
from trainer.offline.reader import StoredSamples
from trainer.offline.source import Split

console = Console()


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the draft.")],
    data: Annotated[Path, typer.Option(help="Folder that capture wrote.")],
    target: Annotated[Path | None, typer.Option(help="Folder of the target, unless the data's is still there.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=16, help="Draft tokens one after another.")] = 3,
    topk: Annotated[int, typer.Option(min=1, max=16, help="Branches of each; above 1, a tree.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=2, help="Rows of a verification of a tree.")] = None,
    holdout_every: Annotated[int, typer.Option(min=1, help="As in training: these samples are used. 1: all.")] = 20,
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Acceptance length of a draft by simulation on held-out stored data: greedy and, of chains, at temperature 1."""
    try:
        speculation = Speculation(steps, topk, tokens)
        samples = StoredSamples(data, None if target is None else fingerprint_target(target))
        job = Job(
            settings=TrainingSettings(),
            target_path=str(target or samples.manifest.target_path),
            target_fingerprint=samples.manifest.target_fingerprint,
            draft_path=str(checkpoint),
            served_dtype=samples.manifest.served_dtype,
            speculation=speculation,
        )
        dtype, place = getattr(torch, job.served_dtype), torch.device(device)
        draft, frozen = load_draft(job, checkpoint).to(place, dtype), load_target(job, dtype, place)
        entries = Split.of(samples.entries, holdout_every).held_out[:limit]
        held_out = [sample for entry in entries if (sample := samples.load(entry)) is not None]
        ways = get_args(Way) if topk == 1 else ("greedy",)
        found: dict[tuple[str, Way], Simulated] = {}
        for way in ways:
            pairs = [(sample.slice, simulate(draft, frozen, [sample], speculation, way)) for sample in held_out]
            slices = by_slice(pairs)
            found["", way] = sum(slices.values(), Simulated.nothing(steps))
            found |= {(name, way): simulated for name, simulated in slices.items() if name and len(slices) > 1}
    except ValueError as error:  # of the checkpoint, the data, the target or the tree
        fail(str(error))
    if json:
        console.print_json(data=_by_way(found))
    else:
        console.print(_table(found, steps))


def _by_way(found: dict[tuple[str, Way], Simulated]) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for (name, way), simulated in found.items():
        if name:
            ways[way].setdefault("slices", {})[name] = _facts(simulated)
        else:
            ways[way] = _facts(simulated)
    return ways


def _facts(simulated: Simulated) -> dict[str, Any]:
    return {
        "acceptance_length": simulated.length,
        "by_position": simulated.by_position,
        "sequences": simulated.sequences,
        "tokens": simulated.tokens,
    }


def _table(found: dict[tuple[str, Way], Simulated], steps: int) -> Table:
    table = Table(title="acceptance by simulation")
    for column in ("", "slice", "length", *(f"draft {k + 1}" for k in range(steps)), "tokens"):
        table.add_column(column)
    for (name, way), simulated in found.items():
        length = "-" if simulated.length is None else f"{simulated.length:.3f}"
        table.add_row(
            way, name or "all", length, *(f"{share:.3f}" for share in simulated.by_position), f"{simulated.tokens:,}"
        )
    return table
