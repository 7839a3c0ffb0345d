"""SGLang 0.5.23: what is hooked where. The table is checked when the server starts with draft training."""

import sys

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches.targets import Members, Symbol, Target, verify

SUPPORTED = "sglang==0.5.23"

_WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_INTERNAL = "sglang.srt.managers.scheduler_components.internal_state"
_STATE = f"{_INTERNAL}.SchedulerInternalStateController"
_DRAFT = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker"
_ADAPTIVE = "sglang.srt.speculative.adaptive_runtime_state"
_LOGITS = "sglang.srt.layers.logits_processor"
_BATCH = "sglang.srt.managers.schedule_batch"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_HTTP = "sglang.srt.entrypoints.http_server"

_CONTROL = "draft versions, A/B windows, capture and readers as numbers for every rank"
TARGETS = (
    Target("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",), "AFTER: the flags"),
    Target("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",), "BEFORE: a run, or nothing"),
    Target("sglang.srt.configs.model_config._get_and_verify_dtype", ("config", "dtype"), "called: the served dtype"),
    Target(f"{_HTTP}.launch_server", ("server_args",), "AROUND: routes, control service and trainer"),
    Target(f"{_MANAGER}.generate_request", ("self", "obj", "request"), "BEFORE: what headers say of a request"),
    Target(f"{_MANAGER}.set_internal_state", ("self", "obj"), f"called: {_CONTROL}"),
    Target(f"{_MANAGER}.get_internal_state", ("self",), "called: what the ranks say"),
    Target(f"{_STATE}._update_handlers", ("self",), f"AFTER: {_CONTROL}"),
    Target(f"{_STATE}._add_speculative", ("self", "state"), "AFTER: this rank's share of the status"),
    Symbol(f"{_INTERNAL}._UpdateHandler", "made: a handler of ours"),
    Symbol(f"{_INTERNAL}.UpdateRejected", "raised: not all ranks have a version"),
    Target(f"{_WORKER}.__init__", ("self", "server_args", "target_worker"), "AFTER: exporter and bank"),
    Target(f"{_WORKER}._forward_prefill_batch", ("self", "batch"), "AROUND: captures prompts"),
    Target(f"{_WORKER}.verify", ("self", "batch"), "AFTER: captures accepted tokens, counts acceptance"),
    Members(f"{_WORKER}", ("target_worker", "draft_worker", "device"), "read: target and draft"),
    Members(f"{_WORKER}", ("adaptive_controller", "speculative_num_steps"), "set: drafting on and off"),
    Target(
        f"{_WORKER}.build_adaptive_runtime_state",
        ("self", "speculative_num_steps", "speculative_num_draft_tokens", "cuda_graph_bs"),
        "relied upon: the depth without drafts",
    ),
    Target(f"{_ADAPTIVE}.AdaptiveController.__init__", ("self", "worker", "policy"), "made: drafting on and off"),
    Members(
        f"{_ADAPTIVE}.AdaptiveSpecPolicy",
        (
            "candidate_steps",
            "set_cuda_graph_bs",
            "get_steps_for_batch",
            "on_verify_complete",
            "cuda_graph_bs_for_step",
        ),
        "implemented: likewise",
    ),
    Members(
        "sglang.srt.environ.Envs", ("SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND",), "set: whether the draft runs undrafted"
    ),
    Members(f"{_DRAFT}", ("draft_runner", "hot_token_id", "device"), "read and written: the live draft"),
    Target("sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3.load_weights", ("self", "weights"), "called: shards"),
    Target(f"{_LOGITS}.LogitsProcessor._get_last_hidden_states_to_store", ("self",), "switched on: last hidden states"),
    Members(f"{_LOGITS}.LogitsProcessor", ("keep_last_hidden_states",), "set: likewise"),
    Members(f"{_LOGITS}.LogitsProcessorOutput", ("hidden_states", "last_hidden_states"), "read: captured states"),
    Members("sglang.srt.speculative.eagle_info.EagleVerifyInput", ("draft_token", "topk"), "read: what was proposed"),
    Members(
        "sglang.srt.managers.utils.GenerationBatchResult",
        ("logits_output", "next_token_ids", "accept_lens", "accept_index"),
        "read: what was accepted",
    ),
    Members(
        f"{_BATCH}.ScheduleBatch",
        ("reqs", "input_ids", "seq_lens", "prefix_lens", "extend_lens", "spec_info", "forward_mode"),
        "read: whose rows are whose",
    ),
    Target(
        f"{_BATCH}.Req.__init__", ("self", "rid", "origin_input_ids", "sampling_params", "lora_id"), "read: the request"
    ),
    Members(
        f"{_BATCH}.Req", ("cached_tokens", "finished", "finished_reason", "output_ids_through_stop"), "read: likewise"
    ),
    Symbol(f"{_BATCH}.FINISH_ABORT", "compared: how a request ended"),
    Target("sglang.srt.sampling.sampling_params.SamplingParams", ("custom_params",), "read: what a request says"),
    Target(f"{_SCHEDULER}.send_abort_output", ("self", "abort_req", "req"), "AFTER: ends that no pass shows"),
    Target(f"{_SCHEDULER}.get_output_streamer_class", ("self",), "AFTER: answers name their draft versions"),
    Target(f"{_STREAMER}.build_additional_customized_info", ("self", "reqs"), "overridden: likewise"),
    Members(f"{_SCHEDULER}", ("forward_ct",), "read: the step of a swap"),
    Symbol("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX", "compared: health checks are not captured"),
    Symbol("sglang.srt.runtime_context.get_parallel", "called: ranks and their groups"),
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
