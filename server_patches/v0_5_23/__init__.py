"""SGLang 0.5.23: what is hooked where. The table is checked when the server starts with draft training."""

import sys

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches.targets import Fields, Target, verify

SUPPORTED = "sglang==0.5.23"

_WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_HTTP = "sglang.srt.entrypoints.http_server"

TARGETS = (
    Target(f"{_WORKER}.__init__", ("self", "server_args", "target_worker")),
    Target(f"{_WORKER}._forward_prefill_batch", ("self", "batch")),
    Target(f"{_WORKER}.verify", ("self", "batch")),
    Target(f"{_SCHEDULER}.send_abort_output", ("self", "abort_req", "req")),
    Target(f"{_SCHEDULER}.get_output_streamer_class", ("self",)),
    Target(f"{_STREAMER}.build_additional_customized_info", ("self", "reqs")),
    Target(f"{_STATE}._update_handlers", ("self",)),
    Target(f"{_STATE}._add_speculative", ("self", "state")),
    Target("sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3.load_weights", ("self", "weights")),
    Target(f"{_MANAGER}.set_internal_state", ("self", "obj")),
    Target(f"{_MANAGER}.get_internal_state", ("self",)),
    Target(f"{_MANAGER}.generate_request", ("self", "obj", "request")),
    Target(f"{_HTTP}.launch_server", ("server_args",)),
    Target("sglang.srt.configs.model_config._get_and_verify_dtype", ("config", "dtype")),
    Target("sglang.srt.layers.logits_processor.LogitsProcessor._get_last_hidden_states_to_store", ("self",)),
    Target(
        "sglang.srt.managers.schedule_batch.Req.__init__",
        ("self", "rid", "origin_input_ids", "sampling_params", "lora_id"),
    ),
    Target("sglang.srt.sampling.sampling_params.SamplingParams", ("custom_params",)),
    Fields("sglang.srt.layers.logits_processor.LogitsProcessorOutput", ("hidden_states", "last_hidden_states")),
    Fields("sglang.srt.speculative.eagle_info.EagleVerifyInput", ("draft_token", "topk")),
    Fields(
        "sglang.srt.managers.utils.GenerationBatchResult",
        ("logits_output", "next_token_ids", "accept_lens", "accept_index"),
    ),
)


def check() -> None:
    """Raises IncompatibleSGLang where this SGLang is not one the hooks were written for."""
    verify(TARGETS, SUPPORTED, sglang.__version__)


def register_flag_hooks() -> None:
    """Launcher: the flags, and turning them into a run."""
    from server_patches.v0_5_23 import flags

    server_args = "sglang.srt.server_args.ServerArgs"
    HookRegistry.register(f"{server_args}.add_cli_args", flags.add_flags, HookType.AFTER)
    HookRegistry.register(f"{server_args}.from_cli_args", flags.consume_flags, HookType.BEFORE)


def register_launcher_hooks() -> None:
    """Launcher of a run: status routes, control service and trainer, around the HTTP server's life; headers."""
    from server_patches.v0_5_23 import consent, http

    HookRegistry.register(f"{_MANAGER}.generate_request", consent.take_headers, HookType.BEFORE)
    HookRegistry.register(f"{_HTTP}.launch_server", http.launch_with_draft_training, HookType.AROUND)


def register_scheduler_hooks() -> None:
    """Scheduler processes of a run: capture, swap and their counters. Nothing in any other process."""
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from server_patches.v0_5_23 import outputs, scheduler

    HookRegistry.register(f"{_WORKER}.__init__", scheduler.attach, HookType.AFTER)
    HookRegistry.register(f"{_WORKER}._forward_prefill_batch", scheduler.around_prefill, HookType.AROUND)
    HookRegistry.register(f"{_WORKER}.verify", scheduler.after_verify, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.send_abort_output", scheduler.after_abort, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.get_output_streamer_class", outputs.choose_streamer, HookType.AFTER)
    HookRegistry.register(f"{_STATE}._update_handlers", scheduler.add_handlers, HookType.AFTER)
    HookRegistry.register(f"{_STATE}._add_speculative", scheduler.add_state, HookType.AFTER)
