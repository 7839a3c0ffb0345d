"""The seams that are the same in every version that is supported."""

from server_patches.targets import Members, Seam, Symbol, Target

WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
ADAPTIVE = "sglang.srt.speculative.adaptive_runtime_state"
LOGITS = "sglang.srt.layers.logits_processor"
BATCH = "sglang.srt.managers.schedule_batch"
RESULT = "sglang.srt.managers.utils.GenerationBatchResult"
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
KILL = "sglang.srt.managers.tokenizer_manager.kill_process_tree"
HTTP = "sglang.srt.entrypoints.http_server"
LAYER = "sglang.srt.models.llama_eagle3.LlamaDecoderLayer"
DRAFT = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker"

CONTROL = "draft versions, A/B windows, capture and readers as numbers for every rank"
STATUS = "this rank's share of the status"
ANSWERS = "answers name their draft versions"
ENDS = "ends that no pass shows"
REPLICA = "which replica of several this is"
SWITCHED = "drafting on and off"
POLICY = ("candidate_steps", "set_cuda_graph_bs", "get_steps_for_batch", "on_verify_complete", "cuda_graph_bs_for_step")
STATES = "read: captured states"

# Ways to change the target's weights, and how many values each answers with.
UPDATES = {
    "update_weights_from_disk": 3,
    "update_weights_from_distributed": 2,
    "update_weights_from_tensor": 2,
    "update_weights_from_ipc": 2,
}

_OPENAI = "sglang.srt.entrypoints.openai"
OPENAI_ANSWERS = (
    f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response",
    f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
)

COMMON: tuple[Seam, ...] = (
    Target("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",), "AFTER: the flags"),
    Target("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",), "BEFORE: a run, or nothing"),
    Target("sglang.srt.configs.model_config._get_and_verify_dtype", ("config", "dtype"), "called: the served dtype"),
    Target(f"{HTTP}.launch_server", ("server_args",), "AROUND: routes, control service and trainer"),
    Target(f"{HTTP}.add_prometheus_middleware", ("app",), "AFTER: our series in /metrics"),
    Target("sglang.srt.utils.auth.auth_level", ("level",), "called: whose key our routes want"),
    Members("sglang.srt.utils.auth.AuthLevel", ("ADMIN_OPTIONAL",), "likewise"),
    Target(f"{MANAGER}.generate_request", ("self", "obj", "request"), "BEFORE: what headers say of a request"),
    Target(f"{MANAGER}.set_internal_state", ("self", "obj"), f"called: {CONTROL}"),
    Target(f"{MANAGER}.get_internal_state", ("self",), "called: what the ranks say"),
    Symbol(KILL, "BEFORE: the trainer saves"),
    Members(MANAGER, ("gracefully_exit",), "read: likewise"),
    *(Target(path, ("self", "request", "ret"), f"AFTER: {ANSWERS}") for path in OPENAI_ANSWERS),
    *(Target(f"{MANAGER}.{name}", ("self", "obj"), "AROUND: refused, the target is fixed") for name in UPDATES),
    Target(f"{WORKER}.__init__", ("self", "server_args", "target_worker"), "AFTER: exporter and bank"),
    Target(f"{WORKER}.verify", ("self", "batch"), "AFTER: captures accepted tokens, counts acceptance"),
    Members(f"{WORKER}", ("target_worker", "draft_worker", "device"), "read: target and draft"),
    Members(f"{WORKER}", ("adaptive_controller", "speculative_num_steps"), f"set: {SWITCHED}"),
    Target(
        f"{WORKER}.build_adaptive_runtime_state",
        ("self", "speculative_num_steps", "speculative_num_draft_tokens", "cuda_graph_bs"),
        "relied upon: the depth without drafts",
    ),
    Members(
        "sglang.srt.environ.Envs", ("SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND",), "set: whether the draft runs undrafted"
    ),
    Members("sglang.srt.model_executor.model_runner.ModelRunner", ("forward_stream",), "waited for: a step, by a swap"),
    Members(f"{DRAFT}", ("draft_runner", "hot_token_id", "device"), "read and written: the live draft"),
    Target(f"{LAYER}.__init__", ("self", "config"), "AFTER: a draft's norms of queries and keys"),
    Members("sglang.srt.models.llama.LlamaAttention", ("head_dim", "rotary_emb"), "read and set: likewise"),
    Target("sglang.srt.models.llama_eagle3.LlamaForCausalLMEagle3.load_weights", ("self", "weights"), "called: shards"),
    Members("sglang.srt.speculative.eagle_info.EagleVerifyInput", ("draft_token", "topk"), "read: what was proposed"),
    Members(RESULT, ("logits_output", "next_token_ids", "accept_lens"), "read: what was accepted"),
    Members(
        f"{BATCH}.ScheduleBatch",
        ("reqs", "input_ids", "seq_lens", "prefix_lens", "extend_lens", "spec_info", "forward_mode"),
        "read: whose rows are whose",
    ),
    Target(
        f"{BATCH}.Req.__init__", ("self", "rid", "origin_input_ids", "sampling_params", "lora_id"), "read: the request"
    ),
    Members(
        f"{BATCH}.Req", ("cached_tokens", "finished", "finished_reason", "output_ids_through_stop"), "read: likewise"
    ),
    Members(f"{BATCH}.Req", ("input_embeds", "multimodal_inputs"), "read: whether it is all tokens"),
    Symbol(f"{BATCH}.MM_PAD_SHIFT_VALUE", "compared: token ids from there on stand for images"),
    Members(f"{BATCH}.MultimodalInputs", ("mrope_positions",), "read: where they are"),
    Symbol(f"{BATCH}.FINISH_ABORT", "compared: how a request ended"),
    Target("sglang.srt.sampling.sampling_params.SamplingParams", ("custom_params",), "read: what a request says"),
    Members(f"{SCHEDULER}", ("forward_ct",), "read: the step of a swap"),
    Symbol("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX", "compared: health checks are not captured"),
    Symbol("sglang.srt.runtime_context.get_parallel", "called: ranks and their groups"),
    Symbol("sglang.srt.runtime_context.get_schedule", "called: the longest prefill pass, which the ring has room for"),
)
