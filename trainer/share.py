"""Samples that one process holds, dealt to all of them.

The first process tells the others what each gets (lengths, then tensors, over the CPU group); with one process nothing
is copied.
"""

from dataclasses import fields
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.deal import deal
from trainer.sample import Sample

_TENSORS = tuple(f.name for f in fields(Sample) if f.type is Tensor)


class _Plan(msgspec.Struct):
    lengths: list[int]
    embeds: list[int]  # how many each has
    starts: list[int]
    slices: list[str]
    passes: list[list[list[int]]]  # by rank, indices
    layouts: list[tuple[str, int]]  # dtype and width of each tensor; width 0 is one number a row


class Dealer:
    """Shares out, and remembers how much each process got."""

    def __init__(self) -> None:
        self._dealt = [0] * dist.get_world_size()

    def share_out(self, samples: list[Sample] | None, pass_tokens: int | None) -> list[list[Sample]] | None:
        """This process's passes of the first process's ``samples``; None where it has none. All processes call
        together."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        plan = self._plan(samples, ranks, pass_tokens) if samples else None
        if ranks > 1:
            plan = _broadcast(plan)
        if plan is None:
            return None
        if rank == 0:
            for other in range(1, ranks):
                for tensor in _joined(samples, plan, other):
                    dist.send(tensor, other)
            return [[samples[i] for i in own] for own in plan.passes[0]]
        return _receive(plan, plan.passes[rank])

    def _plan(self, samples: list[Sample], ranks: int, pass_tokens: int | None) -> _Plan:
        lengths = list(map(len, samples))
        tensors = [getattr(samples[0], name) for name in _TENSORS]
        layouts = [(str(t.dtype).removeprefix("torch."), t.shape[1] if t.ndim > 1 else 0) for t in tensors]
        passes = deal(lengths, ranks, pass_tokens, self._dealt)
        for rank, own in enumerate(passes):
            self._dealt[rank] += sum(lengths[i] for indices in own for i in indices)
        embeds, starts = [len(s.embeds_MH) for s in samples], [s.start for s in samples]
        return _Plan(lengths, embeds, starts, [s.slice for s in samples], passes, layouts)


def _receive(plan: _Plan, passes: list[list[int]]) -> list[list[Sample]]:
    own = [i for indices in passes for i in indices]
    if not own:
        return [[] for _ in passes]
    columns = []
    for name, (dtype, width) in zip(_TENSORS, plan.layouts, strict=True):
        counts = plan.embeds if name in ("embeds_MH", "places_M3") else plan.lengths
        rows = [counts[i] for i in own]
        joined = torch.empty((sum(rows), width) if width else (sum(rows),), dtype=getattr(torch, dtype))
        if joined.numel():
            dist.recv(joined, 0)
        columns.append(joined.split(rows))
    received = {
        i: Sample(rid="", start=plan.starts[i], slice=plan.slices[i], **dict(zip(_TENSORS, tensors, strict=True)))
        for i, tensors in zip(own, zip(*columns, strict=True), strict=True)
    }
    return [[received[i] for i in indices] for indices in passes]


def _joined(samples: list[Sample], plan: _Plan, rank: int) -> list[Tensor]:
    own = [samples[i] for passes in plan.passes[rank] for i in passes]
    joined = [torch.cat([getattr(s, name) for s in own]) for name in _TENSORS] if own else []
    return [tensor for tensor in joined if tensor.numel()]


def tell(text: str | None) -> str:
    """What the first process says, in every process. All processes call together."""
    return gather(text or "", str)[0]


def gather(value: Any, kind: Any) -> list[Any]:
    """What each process gives, of a type that msgspec decodes as ``kind``. All processes call together."""
    if dist.get_world_size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = int(max(sizes))
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(own, (0, longest - own.numel())))
    return [
        msgspec.msgpack.decode(content[: int(size)].numpy().tobytes(), type=kind)
        for content, size in zip(padded, sizes, strict=True)
    ]


def _broadcast(plan: _Plan | None) -> Any:
    data = msgspec.msgpack.encode(plan) if dist.get_rank() == 0 else b""
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    content = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(content, 0)
    return msgspec.msgpack.decode(content.numpy().tobytes(), type=_Plan | None)
