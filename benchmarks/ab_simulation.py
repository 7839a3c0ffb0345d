"""How often an A/B is wrong, and how long it takes, on simulated traffic::

    python benchmarks/ab_simulation.py [--runs 2000] [--quick] [--json FILE]

Each run is judged after every block, as the server judges (``ab/comparison.py``), and ends as an A/B would. The peer is
what many do: a t-test after every block, stopped when it is significant. Requests differ in how well the draft guesses
them, the mix drifts over hours, turns overlap requests, and the two arms of a block see different requests.
"""

from functools import cache
from itertools import product
from typing import Annotated, NamedTuple

import numpy as np
import typer
from measuring import JsonFile, Quick, save_record
from rich.console import Console
from rich.table import Table
from scipy import stats

from sglang_specforge.ab.comparison import Turn, judge
from sglang_specforge.ab.plan import Plan

DRAFTS = 3
PASSES_A_REQUEST = 40
ACCEPTED, SPREAD, DRIFT = 0.55, 0.9, 0.25  # chance of a draft token; of requests and of the mix, in logits
MOST_BLOCKS = 100
OUTCOMES = ("better", "worse", "alike", "undecided")


class Run(NamedTuple):
    outcome: str
    blocks: int
    t_test_alarms: bool


def turn(draws: np.random.Generator, logit: float, requests: int) -> Turn:
    """Verifications: each request has a chance of its own, and drafts are taken until the first wrong one."""
    logits_R = logit + SPREAD * draws.normal(size=requests)
    chance_RP = np.repeat(1 / (1 + np.exp(-logits_R)), PASSES_A_REQUEST)
    right_NP = draws.random((DRAFTS, chance_RP.size)) < chance_RP
    committed_P = 1 + np.cumprod(right_NP, axis=0).sum(0)
    histogram = np.bincount(committed_P, minlength=DRAFTS + 2).tolist()
    return Turn(window=1, seconds=1.0, committed=[[], histogram, []])


@cache
def logit_for(gain: float) -> float:
    """Of a draft whose acceptance length is so much longer than that of ``ACCEPTED``, averaged over requests."""
    base = np.log(ACCEPTED / (1 - ACCEPTED))
    spread = SPREAD * np.random.default_rng(0).normal(size=200_000)

    def length(logit: float) -> float:
        chance = 1 / (1 + np.exp(-(logit + spread)))
        return float(1 + sum((chance ** (k + 1)).mean() for k in range(DRAFTS)))

    low, high, wanted = base - 3, base + 3, (1 + gain) * length(base)
    for _ in range(50):
        low, high = ((low + high) / 2, high) if length((low + high) / 2) < wanted else (low, (low + high) / 2)
    return low


def simulate(draws: np.random.Generator, gain: float, requests: int, plan: Plan) -> Run:
    base, better, mix, alarmed = logit_for(0), logit_for(gain), 0.0, False
    blocks, ratios = [], []
    while True:
        mix = 0.95 * mix + DRIFT * np.sqrt(1 - 0.95**2) * draws.normal()
        pair = [turn(draws, logit + mix, requests) for logit in (base, better)]
        blocks.append(pair)
        ratios.append(np.log(pair[1].acceptance_length / pair[0].acceptance_length))
        alarmed = alarmed or (len(ratios) > 1 and stats.ttest_1samp(ratios, 0).pvalue < plan.alpha)
        outcome = judge(blocks, 2, plan).outcome
        if outcome or len(blocks) == MOST_BLOCKS:
            return Run(outcome or "undecided", len(blocks), bool(alarmed))


def main(
    runs: Annotated[
        int, typer.Option(min=100, help="Simulated comparisons of equals; a tenth of it for the others.")
    ] = 2000,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    runs = 100 if quick else runs
    console = Console(width=140)
    plan = Plan(arms=[0, 1], smallest_difference=0.01)
    table = Table("requests a turn", "true difference", "runs", *OUTCOMES, "blocks: median", "90 %", "t-test alarms")
    samples, ratios = [], {}
    for requests, gain in product((12, 48), (0.0, 0.03, 0.1)):
        count = runs // 10 if gain else runs
        draws = np.random.default_rng([7, requests, round(1000 * gain)])
        found = [simulate(draws, gain, requests, plan) for _ in range(count)]
        share = {outcome: sum(run.outcome == outcome for run in found) / count for outcome in OUTCOMES}
        median, most = np.quantile([run.blocks for run in found], (0.5, 0.9))
        alarms = sum(run.t_test_alarms for run in found) / count
        cells = [f"{gain:.0%}", count, *(f"{s:.1%}" for s in share.values()), round(median), round(most)]
        table.add_row(str(requests), *map(str, cells), f"{alarms:.1%}")
        samples.append({"requests": requests, "gain": gain, "runs": count, **share, "blocks_median": median,
                        "blocks_90": most, "t_test_alarms": alarms})  # fmt: skip
        ratios[f"{requests} requests, {gain:.0%}: found different"] = share["better"] + share["worse"]
    console.print(table)
    if json_file:
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
