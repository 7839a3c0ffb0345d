"""The speculative worker: prompts and verifications by way of ``EAGLEWorkerV2``, which knows its own rank."""

from typing import Any

import torch

from server_patches.common import capture, process
from server_patches.v0_5_22.packing import pack
from server_patches.v0_5_23.worker import install

_accept_index: torch.Tensor | None = None  # of the verification at hand


def attach(result: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.__init__``."""
    process.attach(worker, worker.ps.dp_rank or 0, pack, install, keeps_embeds=False)


def around_batch(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``EAGLEWorkerV2.forward_batch_generation``."""
    if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
        return capture.around_prefill(original, worker, batch, *args, **kwargs)
    return original(worker, batch, *args, **kwargs)


def after_sample(result: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> None:
    """AFTER ``eagle_sample``, whose last result the worker's result lacks."""
    global _accept_index
    _accept_index = result[-1]


def after_verify(result: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.verify``."""
    global _accept_index
    result.accept_index, _accept_index = _accept_index, None
    capture.after_verify(result, worker, batch)
