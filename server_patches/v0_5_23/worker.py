"""The speculative worker: its target keeps last hidden states, its depth is ours to switch, aborts are noted."""

from typing import Any

from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController

from server_patches.common import process
from server_patches.common.capture import note_abort
from server_patches.common.drafting import Switch


def attach(result: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.__init__``."""
    process.attach(worker, get_parallel().dp_rank or 0, _keep_last_hidden, install)


def _keep_last_hidden(processor: LogitsProcessor) -> None:
    processor.keep_last_hidden_states = True


def install(worker: Any, switch: Switch) -> None:
    """Before ``EAGLEWorkerV2.init_cuda_graphs``, which prepares both depths."""
    worker.adaptive_controller = AdaptiveController(worker, switch)


def after_abort(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER ``Scheduler.send_abort_output``."""
    note_abort(req.rid)
