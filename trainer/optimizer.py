"""Optimizers of a run and their learning rate over its steps."""

import math

import torch
from torch import nn

from sglang_specforge.training_settings import TrainingSettings

_BETAS = (0.9, 0.95)
_COSINE_FLOOR = 0.1
_OPEN_END_STEPS = 100_000  # schedule_steps of a run whose end is not known


def make_optimizers(draft: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices within the draft and AdamW for its head and vectors."""
    named = list(draft.named_parameters())
    inner = {n for n, p in named if p.ndim == 2 and n != "lm_head.weight"} if settings.optimizer == "muon" else set()
    adamw = torch.optim.AdamW(
        [p for n, p in named if n not in inner], lr=settings.learning_rate, betas=_BETAS,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    if not inner:
        return [adamw]
    muon = torch.optim.Muon(
        [p for n, p in named if n in inner], lr=settings.muon_learning_rate, weight_decay=settings.weight_decay
    )
    return [adamw, muon]


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], settings: TrainingSettings, step: int, begun: int = 0
) -> None:
    """Before step ``step`` (from 0): each optimizer's peak rate times the schedule's factor."""
    peaks = (settings.learning_rate, settings.muon_learning_rate)
    for optimizer, peak in zip(optimizers, peaks, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule_factor(settings, step, begun)


def schedule_factor(settings: TrainingSettings, step: int, begun: int = 0) -> float:
    """Linear warm-up from step ``begun``, whose weights came from elsewhere, times ``settings.schedule``; what has come
    to its end stays there."""
    warm = min(1.0, (step - begun + 1) / max(1, settings.warmup_steps))
    last = max(settings.warmup_steps + 1, settings.schedule_steps or _OPEN_END_STEPS)
    progress = min(1.0, max(0, step - settings.warmup_steps) / (last - settings.warmup_steps))
    if settings.schedule == "cosine":
        return warm * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
    if settings.schedule == "wsd":
        return warm * min(1.0, (1 - progress) / settings.wsd_decay_share)
    return warm
