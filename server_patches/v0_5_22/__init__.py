"""SGLang 0.5.22: as 0.5.23, but for last hidden states and aborts."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_23
from server_patches.common.seams import COMMON, ENDS, LOGITS, STATES, WORKER
from server_patches.targets import Members, Seam, Symbol, Target

VERSION = "0.5.22"

_TARGET_WORKER = "sglang.srt.managers.tp_worker.TpModelWorker"
_SENDER = "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper"

DOWN_TO_0_5_17: tuple[Seam, ...] = (
    Target(
        f"{LOGITS}.LogitsProcessor._get_hidden_states_to_store",
        ("self", "hidden_states", "aux_hidden_states", "logits_metadata"),
        "wrapped: last hidden states as one more block of the aux states",
    ),
    Members(f"{LOGITS}.LogitsProcessorOutput", ("hidden_states",), STATES),
    Target(f"{_TARGET_WORKER}.forward_batch_generation", ("self",), "AFTER: the blocks taken apart"),
    Target(f"{_SENDER}.send_output", ("self", "output", "recv_obj"), f"BEFORE: {ENDS}"),
    Symbol("sglang.srt.managers.io_struct.AbortReq", "compared: likewise"),
)
TARGETS: tuple[Seam, ...] = (*COMMON, *v0_5_23.DOWN_TO_0_5_22, *DOWN_TO_0_5_17)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_22 import worker

    v0_5_23.register_hooks_down_to_0_5_22()
    register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)


def register_hooks_down_to_0_5_17() -> None:
    from server_patches.v0_5_22 import packing, worker

    HookRegistry.register(f"{_TARGET_WORKER}.forward_batch_generation", packing.unpack, HookType.AFTER)
    HookRegistry.register(f"{_SENDER}.send_output", worker.before_output, HookType.BEFORE)
