"""Ablation: what learning from rejections is worth. The peer is the same training without it::

    python benchmarks/rejections.py [--target DIR] [--quick] [--json FILE]

A real server speculates with a draft that was trained a little; the sequences that it serves, with the draft tokens
that the target refused, are trained on from that same draft with each setting, over several orders of the data. Each
result is evaluated by simulation on other sequences of the same server. On a CPU, some ten minutes.
"""

import random
import statistics
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import torch
import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, save_record, start_capturing
from rich.console import Console
from rich.table import Table

from sglang_specforge.checkpoint import save_checkpoint
from sglang_specforge.client import ask, run_of, wait_until_captured
from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import alias_in
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts
from sglang_specforge.training_settings import Job, Speculation, TrainingSettings
from trainer.assemble import Assembler
from trainer.evaluate import simulate
from trainer.inbox import Inbox
from trainer.learner import Learner
from trainer.process import process_group
from trainer.sample import Sample

ARMS: dict[str, dict[str, float]] = {
    "without": {},
    "weight 1": {"rejection_weight": 1.0},
    "weight 3": {"rejection_weight": 3.0},
    "penalty 0.1": {"rejection_penalty": 0.1},
    "penalty 1": {"rejection_penalty": 1.0},
}
ANSWER_TOKENS, BATCH_TOKENS, STEPS = 64, 1024, 3


def listen(server: ServerProcess, inbox: Inbox, prompts: list[str]) -> list[Sample]:
    """What a trainer gets of the server's answers."""
    samples: dict[str, Sample] = {}
    run = run_of(server.url)

    def answer_of(text: str) -> str:
        rid = uuid.uuid4().hex
        # A key of its own keeps the prefix cache out: all of the sequence is computed, and heard.
        body = {"text": text, "rid": rid, "extra_key": rid}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS}
        httpx.post(f"{server.url}/generate", json=body, timeout=120, trust_env=False).raise_for_status()
        return run.alias(rid)

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(answer_of, text) for text in prompts]
        while not all(answer.done() and answer.result() in samples for answer in answers):
            samples |= {alias_in(sample.rid): sample for sample in inbox.receive(0.2)}
    return [samples[answer.result()] for answer in answers]


def batches(samples: list[Sample], epochs: int, seed: int) -> Iterator[list[Sample]]:
    rng = random.Random(seed)
    for _ in range(epochs):
        batch: list[Sample] = []
        for sample in rng.sample(samples, len(samples)):
            if batch and sum(map(len, batch)) + len(sample) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(sample)
        yield batch


def train(job: Job, samples: list[Sample], epochs: int, **settings: float | str) -> Learner:
    given = {"ttt_steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 10, "schedule": "cosine", **settings}
    order = list(batches(samples, epochs, given.get("seed", 0)))
    chosen = TrainingSettings(schedule_steps=len(order), **given)
    learner = Learner(job.model_copy(update={"settings": chosen}), torch.device("cpu"))
    for batch in order:
        learner.train([batch])
    return learner


def main(
    target: Target = TINY_TARGET,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    first, then, judged, epochs, seeds = (12, 24, 12, 2, 1) if quick else (100, 300, 100, 4, 5)
    prompts = list(islice(stream_prompts(seed=7), first + then + judged))
    with (
        tempfile.TemporaryDirectory() as name,
        process_group(TrainingSettings(trainer_device="cpu", trainer_threads=2)),
    ):
        folder = Path(name)
        with start_capturing(target, folder, "--max-total-tokens", 16384, "--speculative-num-steps", STEPS) as server:
            status, ledger = server.status(), TokenLedger()
            job = Job(
                settings=TrainingSettings(), target_path=status["target_path"], served_dtype="float32",
                target_fingerprint=status["target_fingerprint"], speculation=Speculation(STEPS),
                draft_path=str(folder / "run" / "versions" / "initial"),
            )  # fmt: skip
            inbox = Inbox(status["spans_endpoint"], Assembler(ledger, 4096), ledger)
            wait_until_captured(server.url)
            learner = train(job, listen(server, inbox, prompts[:first]), epochs)
            save_checkpoint(folder / "draft", learner.config, learner.export())
            ask("POST", server.url, "/draft/versions", None, json={"path": str(folder / "draft")}, timeout=180)
            served, held_out = (listen(server, inbox, prompts[i:j]) for i, j in ((first, -judged), (-judged, None)))
            inbox.close()
        job = job.model_copy(update={"draft_path": str(folder / "draft")})
        start = Learner(job, torch.device("cpu"))
        before = simulate(start.draft, start.target, held_out, job.speculation).length
        found = {arm: [] for arm in ARMS}
        for seed in range(seeds):
            for arm, settings in ARMS.items():
                learner = train(job, served, epochs, seed=seed, **settings)
                found[arm].append(simulate(learner.draft, learner.target, held_out, job.speculation).length)
    refused = sum(int((s.rejected_T >= 0).sum()) for s in served)
    show(found, before, refused / sum(int(s.generated_T.sum()) for s in served))
    if json_file:
        records = [
            {"arm": arm, "held_out_acceptance_lengths": lengths, "before": before} for arm, lengths in found.items()
        ]
        save_record(json_file, ratios(found), records)


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Of each setting's acceptance length to the peer's of the same order; medians."""
    peer = found["without"]
    return {arm: statistics.median(a / b for a, b in zip(lengths, peer, strict=True)) for arm, lengths in found.items()}


def show(found: dict[str, list[float]], before: float, refused: float) -> None:
    table = Table(
        title=f"held-out acceptance length; {before:.3f} before; {refused:.0%} of generated rows were refused"
    )
    for column in ("learning from rejections", "median", "lowest to highest", "ratio to without"):
        table.add_column(column)
    for (arm, lengths), ratio in zip(found.items(), ratios(found).values(), strict=True):
        spread = f"{min(lengths):.3f} to {max(lengths):.3f}"
        table.add_row(arm, f"{statistics.median(lengths):.3f}", spread, f"x {ratio:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
