"""What the HTTP process tells the schedulers: numbers that reach every TP rank in the same scheduler iteration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from server_patches.common import process
from sglang_specforge.drafting import Depth

_RESIDENT, _LOADING, _REFUSED = range(3)  # what a rank says of a version


@dataclass(frozen=True)
class Order:
    """What a number does, and what stands against it; both on every rank."""

    apply: Callable[[int], None]
    refusal: Callable[[int], str | None] = lambda value: None


def orders(step: Callable[[], int]) -> dict[str, Order]:
    """By key; none in a process without draft training. ``step`` is the scheduler's."""
    if process.this is None:
        return {}
    bank, replicas = process.this.bank, range(process.this.run.replicas)
    activate = Order(lambda version: bank.activate(version, step()), _agree_on)
    of_others = Order(lambda version: None)
    return {
        "draft_training_evict": Order(bank.evict),
        "draft_training_load": Order(bank.load),
        "draft_training_prepare": Order(lambda version: None, _agree_on),
        "draft_training_activate": activate,
        **{f"draft_training_activate_{i}": activate if i == bank.replica else of_others for i in replicas},
        "draft_training_window": Order(_set_window),
        "draft_training_drafting": Order(_set_drafting),
        "draft_training_capture": Order(_set_capturing),
        "draft_training_reader": Order(_set_reader),
    }


def rank_state() -> dict[str, Any]:
    """This rank's share of ``GET /draft/status``, by its key among SGLang's."""
    if process.this is None:
        return {}
    exporter = process.this.exporter
    export = exporter.counters() if exporter else None
    return {"draft_training": {"bank": process.this.bank.status(), "export": export}}


def _agree_on(version: int) -> str | None:
    """All ranks of the TP group have the version, or none may activate it now."""
    bank, parallel = process.this.bank, get_parallel()
    state = _RESIDENT if bank.is_resident(version) else _REFUSED if bank.refuses(version) else _LOADING
    states = [torch.empty(1, dtype=torch.int64) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(states, torch.tensor([state]), group=parallel.tp_group.cpu_group)
    refusing = [rank for rank, state in enumerate(states) if state == _REFUSED]
    if refusing and not bank.refuses(version):
        bank.refuse(version, f"tensor-parallel rank {refusing[0]} cannot load it; the server's log says why")
    if not all(state == _RESIDENT for state in states):
        return f"draft version {version} is not resident on every rank"
    return None


def _set_window(window: int) -> None:
    process.this.bank.window = window


def _set_drafting(depth: int) -> None:
    if process.this.switch is not None:
        process.this.switch.set(Depth(depth))


def _set_capturing(enabled: int) -> None:
    if process.this.exporter is not None:
        process.this.exporter.paused = not enabled


def _set_reader(lease: int) -> None:
    if process.this.exporter is not None:
        process.this.exporter.reader = lease
