"""Memory that SGLang pins without looking for a GPU, as for LoRA adapters: plain memory, where there is none."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("empty", "ones", "tensor", "zeros")


def ask_for_no_pinned_memory() -> None:
    """In this process, from here on."""
    torch.Tensor.pin_memory = lambda tensor, *args, **kwargs: tensor
    for name in _FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make
