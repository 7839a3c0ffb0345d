"""Rows that chains are unrolled from: those that reach a row to learn from, and no others."""

import pytest
import torch

from tests.tiny import make_sample
from trainer.roots import Roots, Run, runs_of
from trainer.sample import pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("generated_only", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_row_whose_chain_reaches_a_taught_row_is_a_root(generated_only, steps):
    torch.manual_seed(0)
    masks = [torch.rand(T) < share for T, share in ((1, 1), (9, 0.2), (30, 0.1), (2, 1), (5, 0), (12, 0.6))]
    samples = [make_sample(len(mask), generated_T=mask) for mask in masks]
    packed = pack(samples, CPU)
    roots = Roots.of_chains_to(packed.taught(generated_only), len(packed.tokens_N), steps, CPU)
    wanted, taught = [], []
    for (first, end), mask in zip(packed.samples, masks, strict=True):
        teaches = [first + t for t in range(1, end - first) if mask[t] or not generated_only]
        taught += teaches
        wanted += [n for n in range(first, end) if any(n + 1 + k in teaches for k in range(steps))]
    assert [row for _, start, end in packed.taught(generated_only) for row in range(start, end)] == taught
    assert roots.row_L.tolist() == wanted
    assert roots.place_N[roots.row_L].tolist() == list(range(len(wanted)))
    assert int(roots.place_N.max()) < len(wanted)
    assert roots.pick(roots.pick(torch.arange(roots.rows))).tolist() == wanted
    assert all(first in dict(packed.samples) and end <= dict(packed.samples)[first] for first, _, end in roots.runs)


def test_where_nothing_is_taught_one_row_is_computed():
    assert Roots.of_chains_to([], 9, 3, CPU).runs == (Run(0, 0, 1),)


def test_runs():
    for mask in ([1, 1, 0, 1], [0, 1, 1, 0, 0], [1], [0], []):
        runs = runs_of(torch.tensor(mask, dtype=torch.bool))
        assert [row for start, end in runs for row in range(start, end)] == [i for i, one in enumerate(mask) if one]
