"""SGLang 0.5.20: as 0.5.21, but for prompts, for which drafts were accepted, and for which replica this is."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_21, v0_5_23
from server_patches.common.seams import COMMON, REPLICA, WORKER
from server_patches.targets import Members, Seam, Symbol, Target

VERSION = "0.5.20"

_SAMPLE = "sglang.srt.speculative.eagle_worker_common.eagle_sample"

DOWN_TO_0_5_17: tuple[Seam, ...] = (
    *v0_5_21.DOWN_TO_0_5_17,
    Members(WORKER, ("ps",), f"read: {REPLICA}"),
    Target(f"{WORKER}.forward_batch_generation", ("self", "batch"), "AROUND: captures prompts"),
    Target(_SAMPLE, ("verify_input", "batch", "logits_output"), "AFTER: which drafts were accepted"),
    Symbol("sglang.srt.speculative.eagle_worker_common.run_eagle_verify", "relied upon: calls it by that name"),
)
TARGETS: tuple[Seam, ...] = (*COMMON, *v0_5_23.DOWN_TO_0_5_20, *DOWN_TO_0_5_17)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_20 import worker

    v0_5_23.register_hooks_down_to_0_5_20()
    register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)


def register_hooks_down_to_0_5_17() -> None:
    from server_patches.v0_5_20 import worker

    v0_5_21.register_hooks_down_to_0_5_17()
    HookRegistry.register(f"{WORKER}.forward_batch_generation", worker.around_batch, HookType.AROUND)
    HookRegistry.register(_SAMPLE, worker.after_sample, HookType.AFTER)
    HookRegistry.register(f"{WORKER}.verify", worker.after_verify, HookType.AFTER)
