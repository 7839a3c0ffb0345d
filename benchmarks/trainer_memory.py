"""Peak memory of a training step against the draft vocabulary and against the sequence length::

    python benchmarks/trainer_memory.py [--quick] [--json FILE]

A step is forward and backward of 7 steps of the training-time test, fp32, one sample. Peak memory is the process's
resident set above what it holds before the step: weights, the gradients of an earlier step, and the sample. What is
left grows with the draft vocabulary by one gradient of the head, D x H, which is shown apart. The peer is the same
step with the logits of all rows, at all steps of the test, at once.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
import typer
from measuring import JsonFile, Quick, peak_bytes, save_record
from rich.console import Console
from rich.table import Table
from trainer_vs_specforge import Shape, make_samples, make_weights, our_step

from trainer import loss
from trainer.loss import FrozenTarget

VOCABULARIES = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
BY_VOCABULARY = Shape("vocabulary", H=128, V=131_072, D=0, lengths=(512,), prompt=0.0)
BY_LENGTH = Shape("length", H=128, V=8_192, D=4_096, lengths=(), prompt=0.0)


def measure(shape: Shape, whole: bool) -> dict[str, Any]:
    """``whole``: without chunks."""
    torch.manual_seed(0)
    step = our_step(
        shape, make_weights(shape), FrozenTarget(torch.randn(shape.V, shape.H), torch.randn(shape.V, shape.H)),
        make_samples(shape), keep_gradients=True,
    )  # fmt: skip
    chunk_rows = loss._chunk_rows
    if whole:
        loss._chunk_rows = lambda *_: 1 << 30
    try:
        step()  # gradients are there from here on
        return {"shape": asdict(shape), "whole": whole, "peak_bytes": peak_bytes(step)}
    finally:
        loss._chunk_rows = chunk_rows


def show(title: str, column: str, rows: list[tuple[int, dict[str, Any], float | None, int]]) -> None:
    table = Table(title=title)
    for name in (column, "peak, MiB", "without the head's gradient", "bytes a token", "all logits at once, MiB"):
        table.add_column(name, justify="right")
    for value, found, whole, tokens in rows:
        shape = found["shape"]
        rest = found["peak_bytes"] - 4 * shape["D"] * shape["H"]
        table.add_row(
            f"{value:,}", f"{found['peak_bytes'] / 2**20:.0f}", f"{rest / 2**20:.0f}", f"{rest / tokens:,.0f}",
            "-" if whole is None else f"{whole / 2**20:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    by_vocabulary, by_length, samples = [], [], []
    for D in VOCABULARIES[:: 5 if quick else 1]:
        shape = replace(BY_VOCABULARY, D=D)
        samples.append(found := measure(shape, whole=False))
        whole = None
        if D in (VOCABULARIES[0], VOCABULARIES[-1]):
            samples.append(measure(shape, whole=True))
            whole = samples[-1]["peak_bytes"]
        by_vocabulary.append((D, found, whole, 512))
    for length in LENGTHS[: 3 if quick else None]:
        found = measure(replace(BY_LENGTH, lengths=(length,)), whole=False)
        by_length.append((length, found, None, length))
        samples.append(found)
    show("by draft vocabulary: 512 tokens, H=128, V=131,072", "draft vocabulary", by_vocabulary)
    show("by length: H=128, V=8,192, D=4,096", "tokens", by_length)
    if json_file:
        ratios = {
            f"whole/chunked at D={D}": whole / found["peak_bytes"] for D, found, whole, _ in by_vocabulary if whole
        }
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
