"""SGLang 0.5.21: as 0.5.22, but for control, which goes by way of two methods of ``Scheduler``."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_22, v0_5_23
from server_patches.common.seams import COMMON, CONTROL, SCHEDULER, STATUS, WORKER
from server_patches.targets import Members, Seam, Target

VERSION = "0.5.21"

DOWN_TO_0_5_17: tuple[Seam, ...] = (
    *v0_5_22.DOWN_TO_0_5_17,
    Target(f"{SCHEDULER}.set_internal_state", ("self", "recv_req"), f"AROUND: {CONTROL}"),
    Target(f"{SCHEDULER}.get_internal_state", ("self", "recv_req"), f"AFTER: {STATUS}"),
    Members("sglang.srt.managers.io_struct.SetInternalStateReq", ("server_args",), "read: likewise"),
    Target("sglang.srt.managers.io_struct.SetInternalStateReqOutput", ("updated",), "made: its answer"),
)
TARGETS: tuple[Seam, ...] = (*COMMON, *v0_5_23.DOWN_TO_0_5_21, *DOWN_TO_0_5_17)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_22 import worker

    v0_5_23.register_hooks_down_to_0_5_21()
    register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)


def register_hooks_down_to_0_5_17() -> None:
    from server_patches.v0_5_21 import control

    v0_5_22.register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{SCHEDULER}.set_internal_state", control.around_set, HookType.AROUND)
    HookRegistry.register(f"{SCHEDULER}.get_internal_state", control.after_get, HookType.AFTER)
