"""How fast captured states cross to another process, against copying them within one (memcpy, the peer)::

    python benchmarks/transport.py [--quick] [--json FILE]

Five ways: shared memory, ZMQ frames and, as between machines (here over the loopback), TCP under CURVE and pulled by
the Mooncake transfer engine, all as the exporter and the trainer use them (``export/link.py``, ``trainer/inbox.py``),
and pickled pyzmq as one would write it. A state has crossed when it lies in memory of the reader's own, so shared
memory is two copies, in two processes at a time. One thread each; the engine has its own.
"""

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import typer
import zmq
from measuring import JsonFile, Quick, save_record
from rich.console import Console
from rich.table import Table

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Span, TensorLayout
from sglang_specforge.curve import Door, Identity
from sglang_specforge.export.link import Link
from sglang_specforge.export.ring import HostRing
from sglang_specforge.pull import Puller
from sglang_specforge.reader import Way
from sglang_specforge.shared_memory import SegmentRefused
from trainer.inbox import Inbox

PULLED, ENGINE = "tcp, pulled", "tcp://127.0.0.1"
FAR = ("tcp, curve", PULLED)
WAYS = {
    "shared memory": "shared_memory", "zmq frames": "zmq", "tcp, curve": "tcp", PULLED: "mooncake",
    "pickled pyzmq": "pickled pyzmq",
}  # fmt: skip
NAMES = ("aux_N3H", "last_NH", "tokens_N")
HIDDEN, TOKENS = (1024, 4096, 7168), (1, 8, 64, 512, 8192)
RING_BYTES, LARGE = 256 << 20, 1 << 20
LEAST_BYTES, LEAST_MESSAGES, MOST_MESSAGES = 1 << 30, 8, 2000


@dataclass(frozen=True)
class Measured:
    way: str
    hidden: int
    tokens: int
    bytes: int
    gb_s: float
    of_memcpy: float


class Sink:
    """In the place of the assembler: copies states into memory that is there already."""

    def __init__(self, nbytes: int) -> None:
        self.rows, self._own = 0, torch.zeros(nbytes, dtype=torch.uint8)

    def add(self, message: Captured, tensors: dict[str, torch.Tensor], are_intact: Any = None) -> list[Any]:
        at = 0
        for tensor in tensors.values():
            flat = tensor.reshape(-1).view(torch.uint8)
            self._own[at : at + flat.numel()].copy_(flat)
            at += flat.numel()
        self.rows += len(tensors["tokens_N"])
        return []


def read(way: str, endpoint: str, nbytes: int, orders: Connection, own: Identity, peer: str) -> None:
    """The reader's process: says where it listens, takes as many rows as it is told, and says when it has them."""
    torch.set_num_threads(1)
    sink = Sink(nbytes + (1 << 20))
    if way == "pickled pyzmq":
        socket = zmq.Context().socket(zmq.PULL)
        socket.bind(endpoint)

        def receive() -> None:
            found = socket.recv_pyobj()
            sink.add(None, {name: torch.from_numpy(found[name]) for name in NAMES})
    else:
        door, puller = Door(own, peer) if way in FAR else None, Puller(ENGINE) if way == PULLED else None
        endpoint = "tcp://127.0.0.1:*" if door else endpoint
        inbox = Inbox(endpoint, sink, TokenLedger(), door=door, puller=puller, max_ring_bytes=1 << 40)
        endpoint = inbox.endpoint

        def receive() -> None:
            inbox.receive(1.0)

    orders.send(endpoint)
    while (wanted := orders.recv()) is not None:
        until = sink.rows + wanted
        while sink.rows < until:
            receive()
        orders.send("done")


class States:
    """One span of a pass, as the target computed it."""

    def __init__(self, hidden: int, tokens: int) -> None:
        self.aux_N3H = torch.randn(tokens, 3 * hidden).bfloat16()
        self.last_NH = torch.randn(tokens, hidden).bfloat16()
        self.tokens_N = torch.arange(tokens)
        self.nbytes = self.aux_N3H.nbytes + self.last_NH.nbytes

    def copy_into(self, memory: torch.Tensor) -> list[torch.Tensor]:
        cut = self.aux_N3H.nbytes
        aux = memory[:cut].view(torch.bfloat16).view(self.aux_N3H.shape).copy_(self.aux_N3H)
        last = memory[cut : self.nbytes].view(torch.bfloat16).view(self.last_NH.shape).copy_(self.last_NH)
        return [aux, last, self.tokens_N]


class Sender:
    """Sends spans the way it was made for."""

    def __init__(self, way: str, endpoint: str, states: States, ring: HostRing, own: Identity, peer: str) -> None:
        self._way, self._states, self._ring = way, states, ring
        self._sent = 0
        if way == "pickled pyzmq":
            self._socket = zmq.Context.instance().socket(zmq.PUSH)
            self._socket.connect(endpoint)
        else:
            puller = Puller(ENGINE) if way == PULLED else None
            self._link = Link("ipc:///nobody" if way in FAR else endpoint, ring, puller)
            if way in FAR:
                self._link.turn_to(Way(endpoint, peer, own))
            while not self._link.is_read():
                time.sleep(0.01)

    def send(self) -> None:
        states = self._states
        if self._way == "pickled pyzmq":
            named = {"aux_N3H": states.aux_N3H, "last_NH": states.last_NH}
            content = {name: tensor.view(torch.int16).numpy() for name, tensor in named.items()}
            self._socket.send_pyobj({"rid": "a", "start": 0, "tokens_N": states.tokens_N.numpy(), **content})
            return
        while (region := self._ring.reserve(states.nbytes)) is None:
            self._link.release_read()
        tensors = states.copy_into(region.bytes)
        layouts = [
            TensorLayout(name, str(t.dtype).removeprefix("torch."), list(t.shape))
            for name, t in zip(NAMES, tensors, strict=True)
        ]
        span = Span("a", 0, len(states.tokens_N), 0, len(states.tokens_N), 0)
        if not self._link.send_states(Captured("s", self._sent, 0, [span], layouts), tensors, region):
            raise RuntimeError("the reader is gone")
        self._sent += span.length

    @property
    def transport(self) -> str:
        return self._way if self._way == "pickled pyzmq" else self._link.status()["transport"]

    def close(self) -> None:
        if self._way == "pickled pyzmq":
            self._socket.close(linger=0)
        else:
            self._link.close()


def copy_gb_s(states: States, memory: torch.Tensor, messages: int) -> float:
    """memcpy: the same spans into the same amount of memory, one after another."""
    places = max(1, memory.numel() // states.nbytes)
    started_s = time.perf_counter()
    for i in range(messages):
        at = i % places * states.nbytes
        states.copy_into(memory[at : at + states.nbytes])
    return messages * states.nbytes / (time.perf_counter() - started_s) / 1e9


def measure(way: str, hidden: int, tokens: int, rounds: int) -> Measured:
    states = States(hidden, tokens)
    messages = min(MOST_MESSAGES, max(LEAST_MESSAGES, LEAST_BYTES // states.nbytes))
    ring_bytes = max(RING_BYTES, 3 * states.nbytes)
    ring, plain = HostRing(ring_bytes, pinned=False), torch.zeros(ring_bytes, dtype=torch.uint8)
    if way == "zmq frames":
        ring.segment = None
    context = multiprocessing.get_context("spawn")
    orders, others = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/s"
        own, peer = Identity.new(), Identity.new()
        told = (way, endpoint, states.nbytes, others, peer, own.public)
        reader = context.Process(target=read, args=told, daemon=True)
        reader.start()
        sender = Sender(way, orders.recv(), states, ring, own, peer.public)
        found, copied = [], []
        for number in range(rounds + 1):  # the first one touches all memory
            count = min(MOST_MESSAGES, -(-ring_bytes // states.nbytes)) if number == 0 else messages
            copied.append(copy_gb_s(states, plain, count))
            started_s = time.perf_counter()
            orders.send(count * tokens)
            for _ in range(count):
                sender.send()
            orders.recv()
            found.append(count * states.nbytes / (time.perf_counter() - started_s) / 1e9)
        if sender.transport != WAYS[way]:
            raise RuntimeError(f"{way} was asked for, {sender.transport} was used")
        orders.send(None)
        reader.join()
        sender.close()
    ratio = statistics.median(f / c for f, c in zip(found[1:], copied[1:], strict=True))
    return Measured(way, hidden, tokens, states.nbytes, statistics.median(found[1:]), ratio)


def can_pull() -> bool:
    try:
        Puller(ENGINE)
    except SegmentRefused as error:
        print(f"left out: {error}")
        return False
    return True


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    torch.set_num_threads(1)
    ways = [way for way in WAYS if way != PULLED or can_pull()]
    hidden_sizes, spans, rounds = ((1024,), (1, 512), 1) if quick else (HIDDEN, TOKENS, 3)
    table = Table(title="GB/s, and as a share of memcpy in the same run (median)")
    for column in ("hidden size", "tokens of a span", "MB", *ways):
        table.add_column(column, justify="right")
    measured = []
    for hidden in hidden_sizes:
        for tokens in spans:
            row = [measure(way, hidden, tokens, rounds) for way in ways]
            measured += row
            shown = [f"{m.gb_s:.2f} ({m.of_memcpy:.2f})" for m in row]
            table.add_row(str(hidden), str(tokens), f"{row[0].bytes / 1e6:.3f}", *shown)
    Console(width=120).print(table)
    ratios = {
        f"{way}, lowest share of memcpy for spans of 1 MB and more": min(
            m.of_memcpy for m in measured if m.way == way and m.bytes >= LARGE
        )
        for way in ways
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    if json_file:
        save_record(json_file, ratios, [vars(m) for m in measured])


if __name__ == "__main__":
    typer.run(main)
