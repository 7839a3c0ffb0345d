"""The speculative worker, whose adaptive controller takes no policy."""

from typing import Any

from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController

from server_patches.common import process
from server_patches.common.drafting import Switch
from server_patches.v0_5_22.packing import pack


def attach(result: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.__init__``."""
    process.attach(worker, worker.ps.dp_rank or 0, pack, _install, keeps_embeds=False)


def _install(worker: Any, switch: Switch) -> None:
    """Before ``EAGLEWorkerV2.init_cuda_graphs``, which prepares both depths."""
    worker.adaptive_controller = AdaptiveController(worker)
    worker.adaptive_controller.params = switch
