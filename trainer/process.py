"""One process of the trainer: its device, its process group, and its end."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from sglang_specforge.gpus import first_idle
from sglang_specforge.settings import Settings
from sglang_specforge.training_settings import TrainingSettings

logger = logging.getLogger(__name__)


def settle_device(settings: Settings) -> Settings:
    """``trainer_device`` where it is ``auto``: an idle GPU, the first ones under ``torchrun``, or else the CPU."""
    if settings.trainer_device != "auto":
        return settings
    processes, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    first = 0 if 1 < processes <= there else None  # unseen: one would see what another has begun to use
    if processes == 1:
        first = first_idle(1)
    if there and first is None:
        logger.warning(
            "draft training: the trainer computes on the CPU: of %d GPU(s), %d would have to be idle; "
            "--trainer-device cuda:0 shares one",
            *(there, processes),
        )
    return settings.model_copy(update={"trainer_device": "cpu" if first is None else f"cuda:{first}"})


@contextlib.contextmanager
def process_group(settings: TrainingSettings) -> Iterator[torch.device]:
    """Join the other processes that ``torchrun`` started, or be alone; yields this process's device."""
    device = torch.device(settings.trainer_device)
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # FSDP works on the current device
    torch.set_num_threads(settings.trainer_threads)
    torch.manual_seed(settings.seed)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group(backend)
    else:
        # One process: a store in memory is enough, and nothing listens on a port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def stop_signal() -> Callable[[], bool]:
    """Whether SIGTERM or SIGINT has come."""
    came = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: came.append(True))
    return lambda: bool(came)
