"""SGLang 0.5.23: its seams beside the common ones, and what is hooked where in a scheduler process."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches.common.seams import (
    ADAPTIVE,
    ANSWERS,
    COMMON,
    CONTROL,
    DRAFT,
    ENDS,
    LOGITS,
    POLICY,
    REPLICA,
    RESULT,
    SCHEDULER,
    STATES,
    STATUS,
    SWITCHED,
    WORKER,
)
from server_patches.targets import Members, Seam, Symbol, Target

VERSION = "0.5.23"

_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_INTERNAL = "sglang.srt.managers.scheduler_components.internal_state"
_STATE = f"{_INTERNAL}.SchedulerInternalStateController"

DOWN_TO_0_5_20: tuple[Seam, ...] = (
    Target(f"{ADAPTIVE}.AdaptiveController.__init__", ("self", "worker", "policy"), f"made: {SWITCHED}"),
    Members(f"{ADAPTIVE}.AdaptiveSpecPolicy", POLICY, "implemented: likewise"),
    Target(f"{SCHEDULER}.get_output_streamer_class", ("self",), f"AFTER: {ANSWERS}"),
    Target(f"{_STREAMER}.build_additional_customized_info", ("self", "reqs"), "overridden: likewise"),
)
DOWN_TO_0_5_21: tuple[Seam, ...] = (
    *DOWN_TO_0_5_20,
    Members("sglang.srt.runtime_context.SpawnRanks", ("dp_rank",), f"relied upon: {REPLICA}"),
    Target(f"{WORKER}._forward_prefill_batch", ("self", "batch"), "AROUND: captures prompts"),
    Members(RESULT, ("accept_index",), "read: which drafts were accepted"),
    Members(f"{LOGITS}.LogitsProcessorOutput", ("mm_input_embeds",), "read: what stands for images"),
    Target(
        f"{DRAFT}._draft_extend_for_prefill",
        ("self", "batch", "target_hidden_states", "next_token_ids", "mm_input_embeds"),
        "relied upon: the draft reads them, a row ahead",
    ),
)
DOWN_TO_0_5_22: tuple[Seam, ...] = (
    *DOWN_TO_0_5_21,
    Target(f"{_STATE}._update_handlers", ("self",), f"AFTER: {CONTROL}"),
    Target(f"{_STATE}._add_speculative", ("self", "state"), f"AFTER: {STATUS}"),
    Symbol(f"{_INTERNAL}._UpdateHandler", "made: a handler of ours"),
    Symbol(f"{_INTERNAL}.UpdateRejected", "raised: not all ranks have a version"),
)
TARGETS: tuple[Seam, ...] = (
    *COMMON,
    *DOWN_TO_0_5_22,
    Target(f"{LOGITS}.LogitsProcessor._get_last_hidden_states_to_store", ("self",), "switched on: last hidden states"),
    Members(f"{LOGITS}.LogitsProcessor", ("keep_last_hidden_states",), "set: likewise"),
    Members(f"{LOGITS}.LogitsProcessorOutput", ("hidden_states", "last_hidden_states"), STATES),
    Target(f"{SCHEDULER}.send_abort_output", ("self", "abort_req", "req"), f"AFTER: {ENDS}"),
)


def register_scheduler_hooks() -> None:
    """Capture, swap and their counters."""
    from server_patches.v0_5_23 import worker

    register_hooks_down_to_0_5_22()
    HookRegistry.register(f"{WORKER}.__init__", worker.attach, HookType.AFTER)
    HookRegistry.register(f"{SCHEDULER}.send_abort_output", worker.after_abort, HookType.AFTER)


def register_hooks_down_to_0_5_20() -> None:
    from server_patches.v0_5_23 import outputs

    HookRegistry.register(f"{SCHEDULER}.get_output_streamer_class", outputs.choose_streamer, HookType.AFTER)


def register_hooks_down_to_0_5_21() -> None:
    from server_patches.common import capture

    register_hooks_down_to_0_5_20()
    HookRegistry.register(f"{WORKER}._forward_prefill_batch", capture.around_prefill, HookType.AROUND)
    HookRegistry.register(f"{WORKER}.verify", capture.after_verify, HookType.AFTER)


def register_hooks_down_to_0_5_22() -> None:
    from server_patches.v0_5_23 import control

    register_hooks_down_to_0_5_21()
    HookRegistry.register(f"{_STATE}._update_handlers", control.add_handlers, HookType.AFTER)
    HookRegistry.register(f"{_STATE}._add_speculative", control.add_state, HookType.AFTER)
