"""Training on multi-turn chats with the server's prefix cache on: with a prefix store, and without it (the peer)::

    python benchmarks/prefix_store.py [--target DIR] [--quick] [--json FILE]

Chats of six turns with one system prompt of 512 tokens go to a real server, several at a time. Its stream is put
together into samples three times, by the trainer's own code: with a store, with one that has little memory and spills
to disk, and without. Counted are the generated tokens in samples that reach back to position 0, so that the draft
learns them from all of their context. Then the last turn of some chats is computed afresh, past the cache, and its
states are compared with those from the store.
"""

import random
import tempfile
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch
import typer
import zmq
from measuring import TINY_TARGET, JsonFile, Quick, Target, save_record, start_capturing
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from sglang_specforge.client import run_of, wait_until_captured
from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import decode
from sglang_specforge.contracts.spans import alias_in
from sglang_specforge.settings import Run
from sglang_specforge.traffic import stream_prompts
from trainer.assemble import Assembler
from trainer.prefix_store import PrefixStore, block_bytes
from trainer.sample import Sample
from trainer.spill import Spill

SYSTEM_TOKENS, TURNS, ANSWER_TOKENS, CONCURRENCY = 512, 6, 32, 6
LITTLE_BYTES = 8 << 20


@dataclass
class Ingest:
    """The trainer's way from messages to samples."""

    store: PrefixStore
    samples: dict[str, Sample] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._assembler = Assembler(TokenLedger(), 1 << 20, self.store)

    def take(self, frames: list[zmq.Frame]) -> None:
        started = time.thread_time()
        for sample in self._assembler.add(*decode([frame.buffer for frame in frames])):
            self.samples[alias_in(sample.rid)] = sample
        self.seconds += time.thread_time() - started


@dataclass(frozen=True)
class Turn:
    rid: str
    input_ids: list[int]
    output_ids: list[int]


def chat(run: Run, url: str, system: list[int], questions: list[list[int]]) -> list[Turn]:
    turns, context = [], system
    for question in questions:
        context = context + question
        turns.append(generate(run, url, context, ANSWER_TOKENS))
        context = context + turns[-1].output_ids
    return turns


def generate(run: Run, url: str, input_ids: list[int], tokens: int, **given: Any) -> Turn:
    rid = uuid.uuid4().hex
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": input_ids, "rid": rid, "sampling_params": sampling, **given}
    answer = httpx.post(f"{url}/generate", json=body, timeout=300, trust_env=False).raise_for_status()
    return Turn(run.alias(rid), input_ids, answer.json()["output_ids"])


def listen(socket: zmq.Socket, ingests: list[Ingest], work: list[Future]) -> None:
    """Until the work is done and its samples are there."""

    def heard(turns: list[Turn]) -> bool:
        return all(turn.rid in ingest.samples for turn in turns for ingest in ingests)

    while not all(future.done() and heard(future.result()) for future in work):
        if socket.poll(200):
            frames = socket.recv_multipart(copy=False)
            for ingest in ingests:
                ingest.take(frames)


def serve(target: Path, folder: Path, chats: int, compared: int) -> tuple[list[Ingest], list[Turn], dict[str, float]]:
    tokenizer, prompts = AutoTokenizer.from_pretrained(target), stream_prompts(seed=5)
    system = [i for text in islice(prompts, 200) for i in tokenizer.encode(text)][:SYSTEM_TOKENS]
    questions = [[tokenizer.encode(text)[:48] for text in islice(prompts, TURNS)] for _ in range(chats)]
    with start_capturing(target, folder, "--max-total-tokens", 65536) as server, zmq.Context() as context:
        socket = context.socket(zmq.PULL)
        run = run_of(server.url)
        socket.bind(run.spans_endpoint)
        wait_until_captured(server.url)
        hidden_size = AutoConfig.from_pretrained(target).hidden_size
        spill = Spill(folder, 1 << 30, block_bytes(hidden_size, getattr(torch, run.served_dtype)))
        stores = [(1 << 30, None), (LITTLE_BYTES, spill), (0, None)]
        ingests = [Ingest(PrefixStore(run.target_fingerprint, *store)) for store in stores]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            work = [pool.submit(chat, run, server.url, system, q) for q in questions]
            listen(socket, ingests, work)
            turns = [turn for future in work for turn in future.result()]
            last = random.Random(0).sample(turns[TURNS - 1 :: TURNS], compared)
            afresh = [
                pool.submit(lambda t: [generate(run, server.url, t.input_ids, 1, extra_key=uuid.uuid4().hex)], turn)
                for turn in last
            ]
            listen(socket, ingests, afresh)
        socket.close()
    pairs = [(turn, future.result()[0]) for turn, future in zip(last, afresh, strict=True)]
    return ingests, turns, compare(ingests[0], pairs)


def compare(ingest: Ingest, pairs: list[tuple[Turn, Turn]]) -> dict[str, float]:
    """Of the restored positions, how far their states are from those of a fresh prefill."""
    rows, equal_system, system, far = 0, 0, 0, 0.0
    for served, afresh in pairs:
        restored, fresh = ingest.samples[served.rid], ingest.samples[afresh.rid]
        n = restored.restored
        for name in ("aux_T3H", "last_TH"):
            found, wanted = getattr(restored, name)[:n], getattr(fresh, name)[:n]
            far = max(far, float((found - wanted).abs().max() / wanted.abs().max()))
            equal_system += int((found[:SYSTEM_TOKENS] == wanted[:SYSTEM_TOKENS]).all(-1).sum())
            system += SYSTEM_TOKENS
        rows += n
    return {"rows": rows, "largest_relative_difference": far, "system_rows_equal_bit_by_bit": equal_system / system}


def full_context(ingest: Ingest, turns: list[Turn]) -> float:
    """Share of the turns' generated tokens, but each one's last, in samples from position 0."""
    whole = generated = 0
    for turn in turns:
        sample = ingest.samples[turn.rid]
        generated += len(turn.output_ids) - 1
        whole += int(sample.generated_T[:-1].sum()) if sample.start == 0 else 0
    return whole / generated


def main(
    target: Target = TINY_TARGET,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    torch.set_num_threads(1)  # as in the trainer, which shares the machine with the server too
    with tempfile.TemporaryDirectory() as folder:
        ingests, turns, compared = serve(target, Path(folder), 12 if quick else 200, 6 if quick else 20)
    records = []
    table = Table(title=f"{len(turns)} turns; generated tokens learnt from all of their context")
    columns = "", "full context", "positions restored", "missing", "ingest, CPU us a sample", "memory, MiB", "disk, MiB"
    for column in columns:
        table.add_column(column)
    for name, ingest in zip(("with the store", "spilled to disk", "without"), ingests, strict=True):
        share, counts, cost_s = full_context(ingest, turns), ingest.store.counts, ingest.seconds / len(turns)
        records.append({"name": name, "full_context": share, "ingest_cpu_s_per_sample": cost_s})
        records[-1] |= {"restored_tokens": counts.restored_tokens, "missing_tokens": counts.missing_tokens}
        table.add_row(
            name, f"{share:.2%}", f"{counts.restored_tokens:,}", f"{counts.missing_tokens:,}", f"{1e6 * cost_s:.0f}",
            f"{counts.stored_bytes / 2**20:.0f}", f"{counts.spilled_bytes / 2**20:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    Console(width=120).print(
        f"against a fresh prefill: {compared['rows']:,} positions, largest difference "
        f"{compared['largest_relative_difference']:.1e} of the largest state; of the system prompt's, "
        f"{compared['system_rows_equal_bit_by_bit']:.1%} equal bit by bit"
    )
    if json_file:
        ratio = {"full context": records[0]["full_context"], "full context without": records[-1]["full_context"]}
        ratio["ingest with the spill / without it"] = (
            records[1]["ingest_cpu_s_per_sample"] / records[0]["ingest_cpu_s_per_sample"]
        )
        save_record(json_file, ratio, [*records, compared])


if __name__ == "__main__":
    typer.run(main)
