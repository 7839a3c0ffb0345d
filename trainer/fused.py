"""Elementwise work that ``torch.compile`` makes a few kernels of, where the job asks for it (``--compile``).

Matrix products and attention are left to the libraries. What lies between them is written as functions on plain
tensors, each with a gradient of its own, so that one compiled graph serves every length of pack and chain.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
_on = False


def fuse(on: bool = True) -> None:
    """From now on, in this process, each ``fusable`` function runs compiled; it is compiled when first called."""
    global _on
    _on = on


def fusable(function: F) -> F:
    """A function on tensors that are not followed by autograd."""

    @wraps(function)
    def call(*given: Any) -> Any:
        if not _on or torch.compiler.is_compiling():
            return function(*given)
        # Else there would be a graph for each set of inputs that require gradients.
        return _compiled(function)(*(t.detach() if isinstance(t, Tensor) else t for t in given))

    return call  # type: ignore[return-value]


@cache
def _compiled(function: F) -> F:
    """Not before it is called for: the compiler alone takes a second to import."""
    return torch.compile(function)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials of such numbers are computed in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def top(x: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest value of the last dimension, and the first index that has it (int64)."""
    if not torch.compiler.is_compiling():
        return x.max(-1)
    # An index that goes along with the value is not vectorised: the compiled loop would be several times as slow.
    value = x.amax(-1)
    index = torch.arange(x.shape[-1], device=x.device, dtype=torch.int32)
    return value, index.where(x == value[..., None], x.shape[-1] - 1).amin(-1).long()
