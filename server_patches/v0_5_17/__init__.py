"""SGLang 0.5.17: as 0.5.22, with other ways for control, answers, accepted drafts and the depth of drafts."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_22
from server_patches.common.seams import (
    ADAPTIVE,
    ANSWERS,
    COMMON,
    CONTROL,
    POLICY,
    REPLICA,
    SCHEDULER,
    STATUS,
    SWITCHED,
    WORKER,
)
from server_patches.targets import Members, Seam, Symbol, Target

VERSION = "0.5.17"

_ANSWER = "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator"
_SAMPLE = "sglang.srt.speculative.eagle_worker_common.eagle_sample"

TARGETS: tuple[Seam, ...] = (
    *COMMON,
    *v0_5_22.SHARED_WITH_0_5_17,
    Target(f"{SCHEDULER}.set_internal_state", ("self", "recv_req"), f"AROUND: {CONTROL}"),
    Target(f"{SCHEDULER}.get_internal_state", ("self", "recv_req"), f"AFTER: {STATUS}"),
    Members("sglang.srt.managers.io_struct.SetInternalStateReq", ("server_args",), "read: likewise"),
    Target("sglang.srt.managers.io_struct.SetInternalStateReqOutput", ("updated",), "made: its answer"),
    Members(WORKER, ("ps",), f"read: {REPLICA}"),
    Target(f"{WORKER}.forward_batch_generation", ("self", "batch"), "AROUND: captures prompts"),
    Target(_SAMPLE, ("verify_input", "batch", "logits_output"), "AFTER: which drafts were accepted"),
    Symbol("sglang.srt.speculative.eagle_worker_common.run_eagle_verify", "relied upon: calls it by that name"),
    Target(f"{ADAPTIVE}.AdaptiveController.__init__", ("self", "worker"), f"made: {SWITCHED}"),
    Members(f"{ADAPTIVE}.AdaptiveController", ("params",), "set: likewise"),
    Members(f"{ADAPTIVE}.AdaptiveSpeculativeParams", POLICY, "implemented: likewise"),
    Target(f"{_ANSWER}.accept", ("self", "req"), f"AFTER: {ANSWERS}"),
    Members(_ANSWER, ("rids", "customized_info"), "read and written: likewise"),
)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_17 import control, outputs, worker

    v0_5_22.register_hooks_shared_with_0_5_17()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)
    HookRegistry.register(f"{WORKER}.forward_batch_generation", worker.around_batch, HookType.AROUND)
    HookRegistry.register(_SAMPLE, worker.after_sample, HookType.AFTER)
    HookRegistry.register(f"{WORKER}.verify", worker.after_verify, HookType.AFTER)
    HookRegistry.register(f"{SCHEDULER}.set_internal_state", control.around_set, HookType.AROUND)
    HookRegistry.register(f"{SCHEDULER}.get_internal_state", control.after_get, HookType.AFTER)
    HookRegistry.register(f"{_ANSWER}.accept", outputs.after_accept, HookType.AFTER)
