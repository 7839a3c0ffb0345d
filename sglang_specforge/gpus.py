"""GPUs that nobody uses. The driver is asked: CUDA stays untouched in a process that will serve, and start others."""

import torch

_IDLE_BYTES = 2 << 30  # that are in use at most: the driver's own are some hundred MiB


def first_idle(count: int, start: int = 0) -> int | None:
    """The first of ``count`` idle GPUs in a row, from GPU ``start`` on; None where there are none."""
    idle = [gpu >= start and _is_idle(gpu) for gpu in range(torch.cuda.device_count())]
    return next((gpu for gpu in range(len(idle) + 1 - count) if all(idle[gpu : gpu + count])), None)


def _is_idle(gpu: int) -> bool:
    try:
        return torch.cuda.device_memory_used(gpu) <= _IDLE_BYTES
    except Exception:  # not every driver says, each in its own way
        return False
