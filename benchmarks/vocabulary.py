"""A draft vocabulary that follows what is served, against the one that the draft began with (the peer)::

    python benchmarks/vocabulary.py [--draft-vocab-size 512] [--minutes 3] [--quick] [--json FILE]

Two real servers, one after the other, each with a random draft of the lowest ids and the same traffic: one with the
vocabulary fixed (``--draft-training-draft-vocab-gain 1``), as other trainers of drafts have it, and one with the
default. Shown are the acceptance length and tokens a second of the second half of the time, and the share of what is
trained on that the draft can say.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from drift import TRAINING, learn
from measuring import TINY_TARGET, JsonFile, Quick, Target, save_record
from rich.console import Console
from rich.table import Table

from sglang_specforge.demo import SERVING
from sglang_specforge.server_process import ServerProcess

ARMS = {"fixed": ("--draft-training-draft-vocab-gain", 1), "follows": ()}


def measure(target: Path, folder: Path, size: int, arm: tuple[Any, ...], learn_s: float) -> dict[str, Any]:
    of_draft = ("--draft-training-draft-vocab-size", size, *arm)
    given = ["--model-path", target, *SERVING, *TRAINING, *of_draft, "--draft-training-run-dir", folder / "run"]
    with ServerProcess.start(folder / "log", given) as server:
        curve, _ = asyncio.run(learn(server, (None,), learn_s))
        vocabulary = server.status()["trainer"]["vocabulary"]
    end = curve.up_to(len(curve.looks) - 1, learn_s / 2)
    return {"acceptance_length": end.acceptance_length, "tokens_per_s": end.tokens_per_s, **vocabulary}


def main(
    target: Target = TINY_TARGET,
    draft_vocab_size: Annotated[int, typer.Option(min=8, help="Of the tiny target's 1,024 tokens.")] = 512,
    minutes: Annotated[float, typer.Option(min=1, help="Of traffic, for each.")] = 3.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    learn_s = 20.0 if quick else 60 * minutes
    table = Table("vocabulary", "acceptance length", "tokens/s", "coverage", "chosen anew",
                  title=f"{draft_vocab_size} tokens, {learn_s:g} s")  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for arm, flags in ARMS.items():
            found[arm] = one = measure(target, Path(name) / arm, draft_vocab_size, flags, learn_s)
            coverage = "-" if one["coverage"] is None else f"{one['coverage']:.1%}"
            table.add_row(
                arm, f"{one['acceptance_length']:.3f}", f"{one['tokens_per_s']:.0f}", coverage, str(one["chosen"])
            )
    Console(width=120).print(table)
    ratios = {n: found["follows"][n] / found["fixed"][n] for n in ("acceptance_length", "tokens_per_s")}
    print("follows / fixed: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    if json_file:
        samples = [{"vocabulary": arm, "draft_vocab_size": draft_vocab_size, **one} for arm, one in found.items()]
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
