"""SGLang 0.5.17 to 0.5.19: as 0.5.20, but for answers and the depth of drafts."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_20
from server_patches.common.seams import ADAPTIVE, ANSWERS, COMMON, POLICY, SWITCHED, WORKER
from server_patches.targets import Members, Seam, Target

VERSION = "0.5.17"

_ANSWER = "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator"

TARGETS: tuple[Seam, ...] = (
    *COMMON,
    *v0_5_20.DOWN_TO_0_5_17,
    Target(f"{ADAPTIVE}.AdaptiveController.__init__", ("self", "worker"), f"made: {SWITCHED}"),
    Members(f"{ADAPTIVE}.AdaptiveController", ("params",), "set: likewise"),
    Members(f"{ADAPTIVE}.AdaptiveSpeculativeParams", POLICY, "implemented: likewise"),
    Target(f"{_ANSWER}.accept", ("self", "req"), f"AFTER: {ANSWERS}"),
    Members(_ANSWER, ("rids", "customized_info"), "read and written: likewise"),
)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_17 import outputs, worker

    v0_5_20.register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)
    HookRegistry.register(f"{_ANSWER}.accept", outputs.after_accept, HookType.AFTER)
