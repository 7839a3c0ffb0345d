"""``--enable-draft-training`` and its group: argparse flags made from the settings model, and what they imply."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from sglang.srt.configs.model_config import _get_and_verify_dtype
from transformers import PretrainedConfig

from server_patches.common import nodes
from server_patches.common.launcher import apply_run_hooks
from server_patches.cpu import install
from server_patches.supported import check
from server_patches.targets import IncompatibleSGLang
from sglang_specforge.checkpoint import FINGERPRINT_KEY, CheckpointError, load_config
from sglang_specforge.foreign_draft import import_draft
from sglang_specforge.gpus import first_idle
from sglang_specforge.new_draft import check_made_with, init_draft
from sglang_specforge.settings import (
    DraftTrainingSettings,
    Run,
    SettingsError,
    check_machine,
    check_run_folder,
    load_settings,
)
from sglang_specforge.settings_flags import add_settings_flags, flag_of, given_settings
from sglang_specforge.sockets import make_socket_folder
from sglang_specforge.target import TargetError, fingerprint_target, load_target_config, resolve_target
from sglang_specforge.training_settings import Dtype, Speculation
from sglang_specforge.versions import VersionFolder

_PREFIX = "draft_training_"
_DEFAULT_STEPS, _DEFAULT_TOPK = 3, 1
_UNQUANTIZED = "unquant"  # sglang.srt.server_args.QUANTIZATION_CHOICES


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args(parser)``."""
    group = parser.add_argument_group(
        "draft training", "Train the draft on what this server computes, while it serves."
    )
    group.add_argument("--enable-draft-training", action="store_true", help="Capture, train and hot-swap the draft.")
    group.add_argument(
        "--draft-training-config", type=Path, metavar="FILE", help="TOML or YAML file of the settings below; flags win."
    )
    add_settings_flags(group, DraftTrainingSettings, _PREFIX)


def consume_flags(cls: type, args: argparse.Namespace) -> None:
    """BEFORE ``ServerArgs.from_cli_args(args)``: start a run, or change nothing. Exits with 2 on bad settings."""
    given = given_settings(args, DraftTrainingSettings, _PREFIX)
    file = getattr(args, _PREFIX + "config", None)
    try:
        if getattr(args, "enable_draft_training", False):
            settings = load_settings(DraftTrainingSettings, given, file)
            check_run_folder(settings)
            if nodes.rank(args):
                settings = settings.model_copy(update={"trainer": "none"})  # the first node's has it
            if settings.trainer == "spawn":
                settings = _settle_device(args, settings)
                settings.check_spill()
                check_machine(settings, settings.trainer_processes)
            _start_run(args, settings.with_absolute_folders())  # others read them, from folders of their own
        elif given or file:
            flags = ", ".join(flag_of(DraftTrainingSettings, name, _PREFIX) for name in ([*given] or ["config"]))
            raise SettingsError(f"{flags} given without --enable-draft-training; add it, or leave them out")
    except (SettingsError, TargetError, CheckpointError, IncompatibleSGLang) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _start_run(args: argparse.Namespace, settings: DraftTrainingSettings) -> None:
    check()
    _check_engine(args)
    _refuse_contradictions(args, settings)
    settings = _settle_drafting(args, settings)
    folder = resolve_target(args.model_path, args.revision, args.download_dir).absolute()
    target = load_target_config(folder)
    dtype = _served_dtype(target, args.dtype)
    node = nodes.rank(args)
    of_node = f"-{node}" if node else ""  # each writes its own, at the same time
    if given := args.speculative_draft_model_path:
        given = resolve_target(given, args.speculative_draft_model_revision, args.download_dir)
        version, draft = 0, import_draft(given, folder, VersionFolder(settings.run_dir).root / f"given{of_node}")
    else:
        version, draft = _own_draft(settings, folder, dtype, f"initial{of_node}")
    args.speculative_draft_model_path, args.speculative_draft_model_revision = str(draft), None
    _set_speculative_defaults(args)
    sockets = make_socket_folder()
    Run(
        settings=settings,
        target_path=str(folder),
        target_fingerprint=fingerprint_target(folder),
        draft_path=str(draft),
        draft_version=version,
        served_dtype=dtype,
        speculation=_speculation(args),
        spans_endpoint=f"ipc://{sockets}/spans",
        control_endpoint=f"ipc://{sockets}/control",
        disaggregation=_disaggregation(args),
        nodes=nodes.count(args),
        node=node,
        replicas=_replicas(args),
        overrides=_overrides(args),
    ).export()
    apply_run_hooks()


def _own_draft(settings: DraftTrainingSettings, target: Path, dtype: str, initial: str) -> tuple[int, Path]:
    """Number and folder of the draft that this run folder's server had active, or of a random one made now."""
    versions = VersionFolder(settings.run_dir)
    version = versions.last_active()
    draft = versions.path(version) if version else versions.root / initial
    if not (draft / "config.json").exists():
        init_draft(str(target), draft, draft_vocab_size=settings.draft_vocab_size, dtype=dtype, seed=settings.seed)
    elif (found := load_config(draft).get(FINGERPRINT_KEY)) != (expected := fingerprint_target(target)):
        raise SettingsError(
            f"run folder {settings.run_dir} holds drafts of another target (fingerprint {found!r}, served "
            f"{expected!r}); give another --draft-training-run-dir"
        )
    else:
        check_made_with(draft, settings)
    return version, draft


def _served_dtype(target: PretrainedConfig, asked: str) -> str:
    """The type that SGLang serves the target in. It makes float16 of a float32 target unless told otherwise."""
    served = str(_get_and_verify_dtype(target, asked)).removeprefix("torch.")
    if served not in get_args(Dtype):
        raise SettingsError(
            f"--enable-draft-training serves in {' or '.join(get_args(Dtype))}, not {served}; give --dtype bfloat16"
        )
    return served


def _check_engine(args: argparse.Namespace) -> None:
    on_cpu = args.device == "cpu" or (args.device is None and not torch.accelerator.is_available())
    if on_cpu and not install.is_cpu_engine():
        raise SettingsError(f"there is nothing to serve on; {install.HOW_TO_ASK}")


def _refuse_contradictions(args: argparse.Namespace, settings: DraftTrainingSettings) -> None:
    algorithm = args.speculative_algorithm
    if algorithm not in (None, "EAGLE3"):
        raise SettingsError(f"--enable-draft-training trains EAGLE3 drafts, not --speculative-algorithm {algorithm}")
    refused = {
        "speculative_adaptive": "it changes draft depth by load",
        "enable_return_aux_hidden_states": "it switches speculation off",
        "enable_multi_layer_eagle": "only one-layer drafts are trained",
        "speculative_draft_window_size": "drafts are trained to attend to all of their sequence",
        "grpc_mode": "its control service is part of the HTTP server",
        "smg_grpc_mode": "its control service is part of the HTTP server",
        "use_ray": "its control service is part of the HTTP server",
        "encoder_only": "it has no target",
    }
    quantization = getattr(args, "speculative_draft_model_quantization", None)
    if quantization not in (None, _UNQUANTIZED):
        raise SettingsError(
            f"--enable-draft-training does not go with --speculative-draft-model-quantization {quantization}: versions "
            "are swapped in as trained; leave the flag out, and the draft is not quantized, whatever the target is"
        )
    if getattr(args, "load_format", None) == "dummy":
        raise SettingsError(
            "--enable-draft-training does not go with --load-format dummy: the trainer reads the target's head from "
            "the model's folder, and a draft for random weights is of no use"
        )
    for name, why in refused.items():
        if getattr(args, name, False):
            raise SettingsError(f"--enable-draft-training does not go with --{name.replace('_', '-')}: {why}")
    if (getattr(args, "pp_size", 1) or 1) > 1:
        raise SettingsError("--enable-draft-training runs without pipeline parallelism; use --tp-size")
    if nodes.count(args) > 1 and _replicas(args) > 1 and settings.trainer == "spawn":
        raise SettingsError(
            f"--nnodes {args.nnodes} with DP attention: each node computes requests, and a trainer has to be where all "
            "of them reach it; give --draft-training-trainer none, and start python -m trainer attach --listen"
        )
    if (getattr(args, "tokenizer_worker_num", 1) or 1) > 1:
        raise SettingsError("--enable-draft-training needs --tokenizer-worker-num 1")
    if _disaggregation(args) != "null" and settings.trainer == "spawn":
        raise SettingsError(
            f"--disaggregation-mode {args.disaggregation_mode}: one server computes prompts, another answers, and a "
            "trainer needs both; give --draft-training-trainer none, and both to python -m trainer attach"
        )


def _settle_device(args: argparse.Namespace, settings: DraftTrainingSettings) -> DraftTrainingSettings:
    """``auto``: idle GPUs after those that the server takes, or else the CPU."""
    if settings.trainer_device != "auto":
        return settings
    there, processes = 0 if args.device == "cpu" else torch.cuda.device_count(), settings.trainer_processes
    ranks = (args.tp_size or 1) * (1 if _has_old_dp_attention(args) else args.dp_size or 1)
    taken = args.base_gpu_id + args.gpu_id_step * (ranks // nodes.count(args) - 1) + 1
    first = first_idle(processes, taken) if there else None
    if there and first is None:
        print(
            f"draft training: the trainer computes on the CPU: of {there} GPU(s), {processes} after the server's (the "
            f"first {taken}) would have to be idle; --draft-training-trainer-device cuda:0 shares one of the server's "
            "(with a lower --mem-fraction-static)",
            file=sys.stderr,
        )
    return settings.model_copy(update={"trainer_device": "cpu" if first is None else f"cuda:{first}"})


def _settle_drafting(args: argparse.Namespace, settings: DraftTrainingSettings) -> DraftTrainingSettings:
    """``always`` where SGLang cannot switch drafting off, and nobody asked for it. Raises SettingsError."""
    cannot = {
        "--speculative-eagle-topk": (getattr(args, "speculative_eagle_topk", None) or 1) > 1,
        "--attn-dp-size": _attention_groups(args) > 1,
        "--enable-dp-attention": _has_old_dp_attention(args),
        "--enable-lora": getattr(args, "enable_lora", False),
        "--lora-paths": getattr(args, "lora_paths", None),
        "--enable-hisparse": getattr(args, "enable_hisparse", False),
        "--disaggregation-mode": _disaggregation(args) != "null",
    }
    why = next((flag for flag, given in cannot.items() if given), None)
    if why is None or settings.drafting == "always":
        return settings
    if "drafting" in settings.model_fields_set:
        raise SettingsError(
            f"--draft-drafting {settings.drafting} does not go with {why}: drafting cannot be switched off there; give "
            "--draft-drafting always"
        )
    print(f"draft training: every step drafts (--draft-drafting always), because of {why}", file=sys.stderr)
    return settings.model_copy(update={"drafting": "always"})


def _replicas(args: argparse.Namespace) -> int:
    return (args.dp_size or 1) * _attention_groups(args)


def _attention_groups(args: argparse.Namespace) -> int:
    """Of DP attention, within the TP group."""
    return getattr(args, "attn_dp_size", None) or 1  # not in 0.5.17


def _has_old_dp_attention(args: argparse.Namespace) -> bool:
    """``--dp-size`` is the number of its groups then."""
    return getattr(args, "enable_dp_attention", False)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = args.json_model_override_args or "{}"
    try:
        return json.loads(given)
    except ValueError as error:
        raise SettingsError(f"--json-model-override-args {given!r} is no JSON: {error}") from error


def _disaggregation(args: argparse.Namespace) -> str:
    return getattr(args, "disaggregation_mode", None) or "null"


def _speculation(args: Any) -> Speculation:
    try:
        return Speculation(args.speculative_num_steps, args.speculative_eagle_topk, args.speculative_num_draft_tokens)
    except ValueError as error:
        raise SettingsError(f"--speculative-num-draft-tokens: {error}") from error


def _set_speculative_defaults(args: Any) -> None:
    args.speculative_algorithm = "EAGLE3"
    args.speculative_draft_model_quantization = _UNQUANTIZED  # SGLang would quantize it as --quantization says
    args.speculative_num_steps = args.speculative_num_steps or _DEFAULT_STEPS
    args.speculative_eagle_topk = args.speculative_eagle_topk or _DEFAULT_TOPK
    if args.speculative_num_draft_tokens is None:
        args.speculative_num_draft_tokens = Speculation.default_tokens(
            args.speculative_num_steps, args.speculative_eagle_topk
        )
