"""``python -m trainer``: for the server that started it; ``attach``: for running ones; ``--data``: on stored states."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.client import Unanswered
from sglang_specforge.foreign_draft import check_begun_from, import_draft
from sglang_specforge.new_draft import RECIPES, check_made_with, coverage, init_draft
from sglang_specforge.settings import (
    OnlineSettings,
    Run,
    Settings,
    SettingsError,
    check_machine,
    check_run_folder,
    load_settings,
)
from sglang_specforge.settings_flags import add_settings_flags, given_settings
from sglang_specforge.shared_memory import SegmentRefused
from sglang_specforge.sockets import EndpointTaken
from sglang_specforge.target import TargetError, fingerprint_target, load_target_config, resolve_target
from sglang_specforge.training_settings import Job
from sglang_specforge.versions import VersionFolder
from trainer.attach import AttachSettings, CannotAttach, attach
from trainer.learner import Learner
from trainer.loop import Trainer
from trainer.offline.layout import DatasetError, Manifest
from trainer.offline.reader import StoredSamples
from trainer.offline.source import OfflineSettings, OfflineSource, Split
from trainer.online import OnlineSource, OwnServer, Servers
from trainer.process import process_group, settle_device, stop_signal
from trainer.resume import Checkpoints, ResumeError
from trainer.trackers import MissingTracker, Trackers

_REFUSALS = (
    SettingsError, DatasetError, TargetError, CheckpointError, ResumeError, MissingTracker, EndpointTaken, Unanswered,
    CannotAttach, SegmentRefused,
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Exits with 2 where what was given cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run = Run.inherited()
        if run is not None and not arguments:
            train_for(run)
        elif arguments[:1] == ["attach"]:
            train_attached(*_parse_attach(arguments[1:]))
        else:
            train_offline(_parse(arguments))
    except _REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def train_for(run: Run) -> None:
    """Until SIGTERM or SIGINT, or until the server is gone."""
    stopped = stop_signal()
    with process_group(run.settings) as device:
        _train_online(run, run.settings, OwnServer(run), device, stopped)


def train_attached(settings: AttachSettings, api_key: str | None) -> None:
    """Until SIGTERM or SIGINT; servers may come and go."""
    stopped = stop_signal()
    settings = _settle_place(settings)
    with process_group(settings) as device:
        job, servers = attach(settings, api_key)
        _train_online(job, settings, servers, device, stopped)


def _train_online(
    job: Job, settings: OnlineSettings, servers: Servers, device: torch.device, stopped: Callable[[], bool]
) -> None:
    settings.check_spill()
    learner = Learner(job, device)
    progress = Checkpoints(job).resume(learner)
    source = OnlineSource(job, settings, learner, servers, progress and progress.position, _trackers(job, learner))
    Trainer(job, learner, source, stopped, progress and progress.best_acceptance_length).run()


def train_offline(settings: OfflineSettings) -> None:
    """Until the epochs or steps are done, or SIGTERM or SIGINT comes."""
    stopped = stop_signal()
    settings = _settle_place(settings)
    with process_group(settings) as device:
        target = resolve_target(str(settings.target or Manifest.load(settings.data).target_path))
        samples = StoredSamples(settings.data, fingerprint_target(target))
        split = Split.of(samples.entries, settings.holdout_every).check(settings.slice_weights)
        steps = settings.schedule_steps or split.planned_steps(settings)
        settings = settings.model_copy(update={"schedule_steps": steps})
        job = Job(
            settings=settings,
            target_path=str(target),
            target_fingerprint=samples.manifest.target_fingerprint,
            draft_path=str(_starting_draft(settings, target, samples)),
            served_dtype=samples.manifest.served_dtype,
            speculation=settings.speculation,
        )
        learner = Learner(job, device)
        progress = Checkpoints(job).resume(learner)
        position = progress and progress.position
        source = OfflineSource(settings, samples, split, position, _trackers(job, learner), learner.step)
        if source.is_finished() and dist.get_rank() == 0:
            print(f"run folder {settings.run_dir} is done, at step {learner.step}; more --epochs or --max-steps go on")
        Trainer(job, learner, source, stopped, progress and progress.best_acceptance_length).run()


def _settle_place(settings: Settings) -> Settings:
    settings = settle_device(settings)
    check_run_folder(settings)
    check_machine(settings, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return settings


def _starting_draft(settings: OfflineSettings, target: Path, samples: StoredSamples) -> Path:
    """The given draft, or a random one whose vocabulary is the data's most frequent tokens; kept for a restart."""
    versions = VersionFolder(settings.run_dir.absolute()).root
    draft, other = versions / "initial", versions / "given"
    if settings.draft:
        draft, other = other, draft
    if (other / "config.json").exists():
        raise SettingsError(
            f"run folder {settings.run_dir} began from {'a random' if settings.draft else 'a given'} draft; "
            f"go on {'without' if settings.draft else 'with'} --draft, or give another --run-dir"
        )
    if dist.get_rank() == 0:
        given = settings.draft and resolve_target(str(settings.draft))
        if (draft / "config.json").exists():
            if given:
                check_begun_from(given, draft, target, settings)
            else:
                check_made_with(draft, settings)
        elif given:
            import_draft(given, target, draft)
        else:
            counts_V = samples.count_tokens(load_target_config(target).vocab_size)
            chosen = {
                "draft_vocab_size": settings.draft_vocab_size,
                "counts_V": counts_V,
                "variant": RECIPES[settings.recipe],
            }
            init_draft(str(target), draft, dtype=samples.manifest.served_dtype, seed=settings.seed, **chosen)
            print(coverage(counts_V, settings.draft_vocab_size))
    dist.barrier()
    return draft


def _trackers(job: Job, learner: Learner) -> Trackers | None:
    return Trackers(job.settings, learner.step) if dist.get_rank() == 0 else None


def _parse(arguments: Sequence[str]) -> OfflineSettings:
    parser = argparse.ArgumentParser(
        "python -m trainer",
        description="Train on stored states. python -m trainer attach --help: train on what running servers compute.",
    )
    add_settings_flags(parser, OfflineSettings)
    return _settings_of(OfflineSettings, parser, arguments)[0]


def _parse_attach(arguments: Sequence[str]) -> tuple[AttachSettings, str | None]:
    parser = argparse.ArgumentParser(
        "python -m trainer attach",
        description="Train on what running servers compute, and publish versions to them. Start them with "
        "--enable-draft-training --draft-training-trainer none. They may come and go.",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("SGLANG_API_KEY"),
        help="The servers' --admin-api-key, or their --api-key where that is alone (default: $SGLANG_API_KEY).",
    )
    add_settings_flags(parser, AttachSettings)
    settings, args = _settings_of(AttachSettings, parser, arguments)
    return settings, args.api_key


def _settings_of(
    model: type[Settings], parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Settings, argparse.Namespace]:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML or YAML file of the other settings; flags win."
    )
    args = parser.parse_args(arguments)
    return load_settings(model, given_settings(args, model), args.config), args
