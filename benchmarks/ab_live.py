"""A/B of a draft against itself, again and again, on a live server under load: how often it finds a difference::

    make demo; python benchmarks/ab_live.py [--draft DIR] [--runs 20] [--quick] [--json FILE]

Every run goes on until it has a verdict or its blocks are over. Beside the verdict, each run is also judged with the
peer that many would use, a t-test after every block, on the same blocks.
"""

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from measuring import DEMO_DRAFT, TINY_TARGET, JsonFile, Quick, Target, must_exist, save_record, start_capturing
from rich.console import Console
from rich.table import Table
from scipy import stats
from steady_load import in_background

from sglang_specforge.ab.report import Report

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16, "--draft-gate", "off")


def compare_with_itself(client: httpx.Client, plan: dict[str, Any]) -> Report:
    answer = client.post("/draft/ab", json={"arms": ["active", "active"], **plan})
    answer.raise_for_status()
    while (report := Report.model_validate_json(answer.content)).state == "running":
        time.sleep(0.5)
        answer = client.get(f"/draft/ab/{report.id}")
    return report


def t_test_alarms(report: Report, alpha: float) -> bool:
    ratios = [np.log(b.acceptance_length / a.acceptance_length) for a, b in report.blocks]
    return any(stats.ttest_1samp(ratios[:n], 0).pvalue < alpha for n in range(2, len(ratios) + 1))


def main(
    draft: Annotated[Path, typer.Option(help="Checkpoint of a draft that has learnt.")] = DEMO_DRAFT,
    target: Target = TINY_TARGET,
    runs: Annotated[int, typer.Option(min=1, help="How often.")] = 20,
    blocks: Annotated[int, typer.Option(min=2, help="Of each run, at most.")] = 15,
    window_s: Annotated[float, typer.Option(help="Of each turn.")] = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    must_exist(draft, "make demo")
    if quick:
        runs, blocks = 1, min(blocks, 4)
    plan = {"window_s": window_s, "max_blocks": blocks, "min_passes": 50, "smallest_difference": 0.02}
    found: list[Report] = []
    serving = (*SERVING, "--speculative-draft-model-path", draft.resolve())
    with tempfile.TemporaryDirectory() as folder, start_capturing(target, Path(folder), *serving) as server:
        client = httpx.Client(base_url=server.url, timeout=120, trust_env=False)
        with in_background(server.url) as load:
            for seed in range(runs):
                found.append(compare_with_itself(client, {**plan, "seed": seed}))
                report = found[-1]
                print(f"run {seed}: {report.outcome} {report.why}, acceptance {report.arms[0].acceptance_length:.3f}")
    outcomes = Counter(report.outcome for report in found)
    peer = sum(t_test_alarms(report, found[0].plan.alpha) for report in found)
    alarms = outcomes["better"] + outcomes["worse"]
    table = Table("runs", "found different", "t-test after every block", "alike", "undecided", "requests", "failed")
    table.add_row(*map(str, (runs, alarms, peer, outcomes["alike"], outcomes["undecided"], load.requests,
                             len(load.failures))))  # fmt: skip
    Console(width=120).print(table)
    if json_file:
        samples = [
            {"outcome": r.outcome, "blocks": len(r.blocks), **r.judgement.pairs[0].acceptance_length.model_dump()}
            for r in found
        ]
        ratios = {"found different / runs": alarms / runs, "t-test found different / runs": peer / runs}
        save_record(json_file, ratios, samples)


if __name__ == "__main__":
    typer.run(main)
