"""What storing states in float8 costs: the same draft trained on a dataset as it is, and on its float8 copy::

    bash examples/offline_cpu.sh; python benchmarks/stored_float8.py [--data DIR] [--quick] [--json FILE]

``DIR`` is a folder that ``sglang-specforge capture`` wrote. Both drafts are evaluated by simulation on the held-out
samples as they are. The ratio is of acceptance lengths, float8 to the peer, which is the dataset as served.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer
from measuring import OFFLINE_DATA, JsonFile, Quick, must_exist, save_record
from rich.console import Console
from rich.table import Table

from sglang_specforge.training_settings import Job, Speculation, TrainingSettings
from trainer.cli import main as train
from trainer.evaluate import Simulated, simulate
from trainer.learner import load_draft, load_target
from trainer.offline.layout import Manifest
from trainer.offline.reader import StoredSamples
from trainer.offline.source import Split
from trainer.offline.writer import DatasetWriter

HOLDOUT_EVERY, DRAFT_STEPS = 10, 3


def copy_as_float8(samples: StoredSamples, folder: Path) -> None:
    writer = DatasetWriter(folder, msgspec.structs.replace(samples.manifest, stored="float8"), 256 << 20)
    for entry in samples.entries:
        if (sample := samples.load(entry)) is not None:
            writer.add(entry.id, sample.rows, sample.generated_T, entry.slice)
    writer.flush()


def measure(data: Path, run_dir: Path, epochs: int, judged_on: StoredSamples) -> Simulated:
    settings = {
        "data": data, "run-dir": run_dir, "epochs": epochs, "holdout-every": HOLDOUT_EVERY, "batch-tokens": 1024,
        "ttt-steps": 3, "learning-rate": 2e-3, "warmup-steps": 20, "schedule": "cosine", "draft-vocab-size": 768,
        "publish-every-steps": 1 << 30, "trainer-threads": torch.get_num_threads(),
    }  # fmt: skip
    train([str(part) for name, value in settings.items() for part in (f"--{name}", value)])
    manifest, checkpoint = judged_on.manifest, run_dir / "versions" / "best"
    job = Job(
        settings=TrainingSettings(), target_path=manifest.target_path, target_fingerprint=manifest.target_fingerprint,
        draft_path=str(checkpoint), served_dtype=manifest.served_dtype, speculation=Speculation(DRAFT_STEPS),
    )  # fmt: skip
    target = load_target(job, getattr(torch, manifest.served_dtype), torch.device("cpu"))
    held_out = [judged_on.load(entry) for entry in Split.of(judged_on.entries, HOLDOUT_EVERY).held_out]
    return simulate(load_draft(job, checkpoint), target, held_out, Speculation(DRAFT_STEPS))


def main(
    data: Annotated[Path, typer.Option(help="Folder that capture wrote.")] = OFFLINE_DATA,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    must_exist(data, "examples/offline_cpu.sh")
    samples, epochs = StoredSamples(data), 1 if quick else 8
    with tempfile.TemporaryDirectory() as folder:
        places = {samples.manifest.stored: data, "float8": Path(folder) / "float8"}
        copy_as_float8(samples, places["float8"])
        row_bytes = {stored: Manifest.load(place).row_bytes for stored, place in places.items()}
        found = {
            stored: measure(place, Path(folder) / f"run-{stored}", epochs, samples) for stored, place in places.items()
        }
    table = Table(title="trained on stored states, evaluated on those as served")
    for column in ("stored", "bytes a token", "held-out acceptance length"):
        table.add_column(column)
    for stored, simulated in found.items():
        table.add_row(stored, f"{row_bytes[stored]:,}", f"{simulated.length:.3f}")
    Console(width=100).print(table)
    if json_file:
        ratio = found["float8"].length / found[samples.manifest.stored].length
        records = [{"stored": stored, **asdict(simulated)} for stored, simulated in found.items()]
        save_record(json_file, {"acceptance length, float8 to as served": ratio}, records)


if __name__ == "__main__":
    typer.run(main)
