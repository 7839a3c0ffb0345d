"""Hooks of the launcher's process, the same in every version: the flags, and what they start."""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register_flag_hooks() -> None:
    """The flags, and turning them into a run."""
    from server_patches.common import flags

    server_args = "sglang.srt.server_args.ServerArgs"
    HookRegistry.register(f"{server_args}.add_cli_args", flags.add_flags, HookType.AFTER)
    HookRegistry.register(f"{server_args}.from_cli_args", flags.consume_flags, HookType.BEFORE)


def apply_run_hooks() -> None:
    """Of a run: status routes, control service and trainer, around the HTTP server's life; headers; answers of
    OpenAI's API; a fixed target."""
    from server_patches.common import consent, fixed_target, http, outputs
    from server_patches.common.seams import HTTP, KILL, MANAGER, OPENAI_ANSWERS, UPDATES

    HookRegistry.register(f"{MANAGER}.generate_request", consent.take_headers, HookType.BEFORE)
    HookRegistry.register(f"{HTTP}.launch_server", http.launch_with_draft_training, HookType.AROUND)
    HookRegistry.register(f"{HTTP}.add_prometheus_middleware", http.serve_our_series, HookType.AFTER)
    HookRegistry.register(KILL, http.let_the_trainer_save, HookType.BEFORE)
    for path in OPENAI_ANSWERS:
        HookRegistry.register(path, outputs.add_to_metadata, HookType.AFTER)
    for name in UPDATES:
        HookRegistry.register(f"{MANAGER}.{name}", fixed_target.refusal_of(name), HookType.AROUND)
    HookRegistry.apply_hooks()
