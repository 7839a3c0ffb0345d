"""How many servers one trainer takes, what their rings have to hold, and what the network has to carry::

    python benchmarks/fleet_simulation.py [--way tcp] [--hidden 4096] [--tokens-s 2000] ... [--quick] [--json FILE]

A simulation of the trainer's first process (``trainer/online.py``): take in what has come, then train a step, which
lasts ``--step-s``; meanwhile what comes waits in the servers' rings, and what finds no room is left out. What it costs
to take in a message, each request's span of it, and each byte, is measured here first, with the exporter's link and the
trainer's inbox (``--way``). Then two rows of the simulation are checked against four real exporter processes and a
reader whose step is a sleep of that length.
Poisson arrivals, messages of equal size; the trainer's step is given, not measured: take it from
``benchmarks/trainer_vs_specforge.py`` on the machine in question.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from measuring import JsonFile, Quick, save_record
from rich.console import Console
from rich.table import Table

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Finished, Span, TensorLayout
from sglang_specforge.curve import Door, Identity
from sglang_specforge.export.link import Link
from sglang_specforge.export.ring import HostRing
from sglang_specforge.reader import Way
from trainer.assemble import Assembler
from trainer.inbox import _QUEUED_MESSAGES, Inbox

Transport = Literal["shared_memory", "tcp"]
FLEETS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000)
SIMULATED_S, CHECKED_S, QUICKLY_CHECKED_S, CALIBRATED_S = 120.0, 20.0, 8.0, 4.0
EXPORTERS = 4
_LEAST_CYCLES = 200
_PASSES = 16  # of a request
_SPANS = 64  # of a message whose spans' cost is measured
_CALM_MESSAGES_S, _CALM_BYTES_S, _PAUSE_S = 200.0, 1e8, 0.2


@dataclass(frozen=True)
class Setting:
    """What is given. ``credit`` tokens trained on for each that comes pay for a step of ``step_tokens``."""

    way: Transport
    hidden: int
    tokens_s: float  # that each server computes
    pass_tokens: int  # of a message
    requests: int  # that share them: each has a span of the message
    ring_bytes: int
    step_s: float
    step_tokens: int
    credit: float

    @property
    def message_bytes(self) -> int:
        return self.pass_tokens * 4 * self.hidden * 2  # bfloat16: three aux layers and the last

    @property
    def messages_s(self) -> float:
        return self.tokens_s / self.pass_tokens

    @property
    def beyond(self) -> int:
        """Messages of one server that wait at a socket's other end while a step lasts."""
        return _QUEUED_MESSAGES if self.way == "tcp" else 0

    @property
    def waiting(self) -> int:
        """Messages of one server that find room while a step lasts, those in its ring among them."""
        return self.ring_bytes // self.message_bytes + self.beyond

    def paid_after_step(self, paid: float) -> float:
        """What is left for the next steps; like a replay buffer, it does not grow without end."""
        return min(paid - self.step_tokens, 4.0 * self.step_tokens)


@dataclass(frozen=True)
class Cost:
    """Of taking in, seconds of the reader's first thread; and what one stream carries."""

    message_s: float
    span_s: float  # each one's part of its request's end among it
    byte_s: float
    stream_bytes_s: float

    def of(self, given: Setting) -> float:
        """A message."""
        return self.message_s + self.span_s * given.requests + self.byte_s * given.message_bytes


@dataclass(frozen=True)
class Row:
    servers: int
    captured: float  # share of the tokens
    trained: float  # of the passes over them that were wanted
    ingesting: float  # share of the trainer's time
    ring_mb: float  # the most that one server's held
    network_gbit_s: float


def simulate(servers: int, given: Setting, cost: Cost, seconds: float = SIMULATED_S) -> Row:
    random = np.random.default_rng(0)
    taking_s = cost.of(given)
    now_s = ingested_s = 0.0
    paid, steps, offered, taken = 0.0, 0, 0, 0
    highest, cycles = 0.0, 0
    cycle_s = 0.01
    while now_s < seconds or cycles < _LEAST_CYCLES:
        cycles += 1
        came = random.poisson(given.messages_s * cycle_s, servers)
        carried = int(cost.stream_bytes_s * cycle_s / given.message_bytes) + 1
        kept = np.minimum(np.minimum(came, given.waiting), carried)
        offered, taken = offered + int(came.sum()), taken + int(kept.sum())
        if cycle_s >= given.step_s:
            highest = max(highest, float(max(1, kept.max() - given.beyond)) * given.message_bytes)
        spent_s = float(kept.sum()) * taking_s
        paid += given.credit * float(kept.sum()) * given.pass_tokens
        trains = paid >= given.step_tokens
        if trains:
            paid, steps = given.paid_after_step(paid), steps + 1
        cycle_s = max(0.01, spent_s + (given.step_s if trains else 0.0))
        now_s, ingested_s = now_s + cycle_s, ingested_s + spent_s
    wanted = given.credit * taken * given.pass_tokens / given.step_tokens
    return Row(
        servers=servers,
        captured=taken / max(1, offered),
        trained=min(1.0, steps / max(1.0, wanted)),
        ingesting=ingested_s / now_s,
        ring_mb=highest / 1e6,
        network_gbit_s=8e-9 * taken * given.message_bytes / now_s if given.way == "tcp" else 0.0,
    )


def export(endpoint: str, given: Setting, seconds: float, keys: tuple[Identity, str], said: Connection) -> None:
    """An exporter's process. Says what was offered and left out, in messages, and what its ring held at most."""
    torch.set_num_threads(1)
    ring = HostRing(given.ring_bytes, pinned=False)
    link = Link(endpoint if given.way != "tcp" else "ipc:///nobody", ring)
    if given.way == "tcp":
        link.turn_to(Way(endpoint, keys[1], keys[0]))
    tokens_N = torch.arange(given.pass_tokens)
    shapes = {"aux_N3H": [given.pass_tokens, 3 * given.hidden], "last_NH": [given.pass_tokens, given.hidden]}
    layouts = [TensorLayout(name, "bfloat16", shape) for name, shape in shapes.items()]
    layouts.append(TensorLayout("tokens_N", "int64", [given.pass_tokens]))
    cut = given.pass_tokens * 6 * given.hidden
    while not link.is_read():
        time.sleep(0.01)
    stream, sent, number, left_out, highest = f"{id(ring):x}", 0, 0, 0, 0
    random = np.random.default_rng()
    start_s = due_s = time.perf_counter()
    while (now_s := time.perf_counter()) - start_s < seconds:
        link.release_read()
        highest = max(highest, ring.used_bytes)
        if now_s < due_s:
            time.sleep(min(due_s - now_s, 0.002))
            continue
        due_s, number = due_s + random.exponential(1 / given.messages_s), number + 1
        if (region := ring.reserve(given.message_bytes)) is None:
            left_out += 1
            continue
        aux, last = (
            part.view(torch.bfloat16).view(shape)
            for part, shape in zip((region.bytes[:cut], region.bytes[cut:]), shapes.values(), strict=True)
        )
        each, spans, ended = given.pass_tokens // given.requests, [], []
        for i in range(given.requests):
            nth, place = divmod(number + i, _PASSES)  # requests end one after another, not all at once
            spans.append(Span(f"{i}-{nth}", place * each, each, i * each, 1, 0))
            if place == _PASSES - 1:
                ended.append(spans[-1].rid)
        link.send_states(Captured(stream, sent, 0, spans, layouts), [aux, last, tokens_N], region)
        sent += given.pass_tokens
        for rid in ended:
            link.send(Finished(stream, sent, rid, _PASSES * each, False))
    said.send((number, left_out, highest))
    link.close()


class Reader:
    """The trainer's first process, without a trainer."""

    def __init__(self, folder: Path, given: Setting, streams: int) -> None:
        self.given, self.messages, self.steps, self.ingested_s = given, 0, 0, 0.0
        self.keys = [(Identity.new(), Identity.new()) for _ in range(streams)]  # the server's, and the reader's
        self.inboxes, self.ledgers = [], []
        for place, (server, own) in enumerate(self.keys):
            door = Door(own, server.public) if given.way == "tcp" else None
            endpoint = "tcp://127.0.0.1:*" if door else f"ipc://{folder}/{place}"
            ledger = TokenLedger()
            inbox = Inbox(endpoint, Assembler(ledger, 4096), ledger, door=door)
            self.inboxes.append(inbox)
            self.ledgers.append(ledger)

    def run(self, is_over: Any, *, trains: bool = True) -> None:
        paid, given = 0.0, self.given
        while not is_over():
            before, started_s = self.messages, time.perf_counter()
            for inbox in self.inboxes:
                inbox.receive(0)
            self.messages = sum(ledger.received for ledger in self.ledgers) // given.pass_tokens
            came = self.messages - before
            self.ingested_s += (time.perf_counter() - started_s) if came else 0.0
            paid += given.credit * came * given.pass_tokens
            if trains and paid >= given.step_tokens:
                paid, self.steps = given.paid_after_step(paid), self.steps + 1
                time.sleep(given.step_s)
            elif not came:
                time.sleep(0.001)


@contextmanager
def fleet(given: Setting, streams: int, seconds: float) -> Iterator[tuple[Reader, list[Connection], list[Any]]]:
    """Exporter processes and who reads them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder), given, streams)
        ears, processes = [], []
        for inbox, (server, own) in zip(reader.inboxes, reader.keys, strict=True):
            ear, mouth = context.Pipe(duplex=False)
            told = (inbox.endpoint, given, seconds, (server, own.public), mouth)
            processes.append(context.Process(target=export, args=told, daemon=True))
            ears.append(ear)
            processes[-1].start()
        yield reader, ears, processes
        for process in processes:
            process.join()


def calibrate(given: Setting) -> Cost:
    """From one stream, at a rate that leaves the cores room and taken in some messages at a time, as between steps:
    messages of one token, of many, and of many requests of one token each. Then from one as fast as it goes."""
    many = max(64, given.pass_tokens)
    small, large, shared = (_taking_s(given, *kind) for kind in ((1, 1), (many, 1), (_SPANS, _SPANS)))
    token_bytes = replace(given, pass_tokens=1).message_bytes
    byte_s = max(0.0, (large - small) / ((many - 1) * token_bytes))
    span_s = max(0.0, (shared - small) / (_SPANS - 1) - byte_s * token_bytes)
    flat_out = replace(given, pass_tokens=many, requests=1, tokens_s=many * 1e6, ring_bytes=256 << 20)
    messages, _ = _stream(flat_out)
    stream_bytes_s = messages * flat_out.message_bytes / CALIBRATED_S
    return Cost(max(0.0, small - span_s - byte_s * token_bytes), span_s, byte_s, stream_bytes_s)


def _taking_s(given: Setting, pass_tokens: int, requests: int) -> float:
    """Seconds of the reader's thread that a message takes."""
    one = replace(given, pass_tokens=pass_tokens, requests=requests, ring_bytes=256 << 20)
    messages_s = min(_CALM_MESSAGES_S, _CALM_BYTES_S / one.message_bytes)
    messages, taking_s = _stream(replace(one, tokens_s=messages_s * pass_tokens), _PAUSE_S)
    return taking_s / messages


def _stream(given: Setting, pause_s: float = 0.0) -> tuple[int, float]:
    """What comes of one exporter in ``CALIBRATED_S``: messages, and the seconds that they took to take in, with a pause
    after each time."""
    with fleet(given, 1, CALIBRATED_S) as (reader, ears, _):
        reader.run(lambda: ears[0].poll(pause_s), trains=False)
        return max(1, reader.messages), reader.ingested_s


def check(given: Setting, cost: Cost, seconds: float) -> tuple[Row, Row]:
    """The simulation's row for four servers, and what four processes did in so many seconds."""
    with fleet(given, EXPORTERS, seconds) as (reader, ears, processes):
        reader.run(lambda: all(ear.poll() for ear in ears) or not any(p.is_alive() for p in processes))
        said = [ear.recv() for ear in ears]
    offered, left_out = sum(number for number, _, _ in said), sum(out for _, out, _ in said)
    wanted = given.credit * reader.messages * given.pass_tokens / given.step_tokens
    real = Row(
        servers=EXPORTERS,
        captured=1 - left_out / offered,
        trained=min(1.0, reader.steps / max(1.0, wanted)),
        ingesting=reader.ingested_s / seconds,  # the processes' start is left out
        ring_mb=max(held for _, _, held in said) / 1e6,
        network_gbit_s=8e-9 * reader.messages * given.message_bytes / seconds if given.way == "tcp" else 0.0,
    )
    return simulate(EXPORTERS, given, cost, seconds), real


def show(title: str, rows: list[tuple[str, Row]]) -> None:
    table = Table(title=title)
    for column in ("servers", "captured", "trained", "ingesting", "ring, MB", "network, Gbit/s"):
        table.add_column(column, justify="right")
    for name, row in rows:
        shares = [f"{100 * share:.1f}%" for share in (row.captured, row.trained, row.ingesting)]
        table.add_row(name, *shares, f"{row.ring_mb:.1f}", f"{row.network_gbit_s:.2f}")
    Console(width=120).print(table)


def main(
    way: Annotated[str, typer.Option(help="shared_memory or tcp.")] = "tcp",
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size of the target.")] = 4096,
    tokens_s: Annotated[float, typer.Option(min=0.1, help="Tokens a second that each server computes.")] = 2000.0,
    pass_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass, which is a message.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Requests that share them.")] = 16,
    ring_mb: Annotated[int, typer.Option(min=1, help="The servers' --draft-training-ring-mb.")] = 256,
    step_s: Annotated[float, typer.Option(min=0.001, help="Seconds of a training step.")] = 0.5,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a training step.")] = 8192,
    epochs_per_token: Annotated[float, typer.Option(min=0.01, help="The trainer's.")] = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    torch.set_num_threads(1)
    if way not in Transport.__args__:
        raise typer.BadParameter(f"{way!r} is not accepted; give {' or '.join(Transport.__args__)}", param_hint="--way")
    if pass_tokens % requests:
        raise typer.BadParameter(
            f"{requests} requests cannot share {pass_tokens} tokens alike; give a divisor", param_hint="--requests"
        )
    given = Setting(way, hidden, tokens_s, pass_tokens, requests, ring_mb << 20, step_s, step_tokens, epochs_per_token)
    cost = calibrate(given)
    print(
        f"measured: {1e6 * cost.message_s:.0f} us a message, {1e6 * cost.span_s:.1f} us a span and "
        f"{1e9 * cost.byte_s:.3f} ns a byte of the trainer's first thread; "
        f"one stream carries {cost.stream_bytes_s / 1e9:.2f} GB/s"
    )
    rows = [simulate(servers, given, cost) for servers in FLEETS]
    show(f"simulated: {given}", [(str(row.servers), row) for row in rows])
    samples: list[dict[str, Any]] = [{"kind": "simulated", **asdict(given), **asdict(row)} for row in rows]
    ratios: dict[str, float] = {}
    # Small enough for four processes on two cores; the second so that some find no room.
    small = replace(given, hidden=1024, tokens_s=1280.0, pass_tokens=32, requests=8, step_tokens=1024)
    calm = replace(small, ring_bytes=64 << 20, step_s=0.4)
    for name, checked in {"calm": calm, "tight": replace(calm, ring_bytes=4 << 20, step_s=2.0)}.items():
        predicted, real = check(checked, cost, QUICKLY_CHECKED_S if quick else CHECKED_S)
        show(f"checked ({name}): {checked}", [("4, simulated", predicted), ("4, real", real)])
        ratios[f"{name}: captured, simulated against real"] = predicted.captured / real.captured
        ratios[f"{name}: time taking in, simulated against real"] = predicted.ingesting / max(real.ingesting, 1e-9)
        ratios[f"{name}: ring, simulated against real"] = predicted.ring_mb / max(real.ring_mb, 1e-9)
        samples += [
            {"kind": f"{name}, {kind}", **asdict(checked), **asdict(row)}
            for kind, row in {"simulated": predicted, "real": real}.items()
        ]
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    if json_file:
        save_record(json_file, ratios, [asdict(cost), *samples])


if __name__ == "__main__":
    typer.run(main)
