"""Checkpoints of the training itself, under ``<run_dir>/checkpoints``: weights, optimizers, counters, data position."""

import logging
import shutil
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sglang_specforge.contracts.control import Parity, TokenLedger
from sglang_specforge.training_settings import Job
from trainer.learner import Learner

logger = logging.getLogger(__name__)


class StreamPosition(msgspec.Struct, kw_only=True):
    """The account of a live stream; it belongs to one life of its server, known by its endpoint."""

    spans_endpoint: str
    ledger: TokenLedger
    parity: Parity


class OnlinePosition(msgspec.Struct, tag="online", kw_only=True):
    """The accounts of the servers that are trained on."""

    streams: list[StreamPosition]


class OfflinePosition(msgspec.Struct, tag="offline", kw_only=True):
    """The next sample of an epoch's order, and what was found damaged so far."""

    dataset: str  # digest of the samples and of what decides their order
    epoch: int = 0
    index: int = 0
    damaged: list[str] = []


Position = OnlinePosition | OfflinePosition


class Progress(msgspec.Struct, kw_only=True):
    """What is not a tensor."""

    step: int
    target_fingerprint: str
    acceptance_K: list[float]
    best_acceptance_length: float | None  # of the versions so far, on held-out samples
    position: Position
    optimizer: str | None = None  # its setting; None: not noted
    begun: int = 0  # ``Learner.begun``


class ResumeError(RuntimeError):
    """The newest checkpoint does not belong to this run."""


class Checkpoints:
    """Writes and finds them; a checkpoint counts once its folder has its final name. All processes call together."""

    def __init__(self, job: Job) -> None:
        self._job, self._root = job, job.run_dir / "checkpoints"

    def save(self, learner: Learner, position: Position, best: float | None = None) -> None:
        model, optimizer = get_state_dict(learner.draft, learner.optimizers)
        folder = self._root / f"{learner.step:09d}"
        part = folder.with_suffix(".part")
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=part)
        save_file({"cpu": torch.get_rng_state()}, _rng_file(part))
        dist.barrier()
        if first:
            progress = Progress(
                step=learner.step,
                target_fingerprint=self._job.target_fingerprint,
                acceptance_K=learner.acceptance_K,
                best_acceptance_length=best,
                position=position,
                optimizer=self._job.settings.optimizer,
                begun=learner.begun,
            )
            (part / "progress.json").write_bytes(msgspec.json.encode(progress))
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            for old in self._saved()[: -self._job.settings.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def note(self, position: Position) -> None:
        """In the newest checkpoint, since which nothing was learnt; without one it is not kept."""
        if dist.get_rank() != 0 or not (saved := self._saved()):
            return
        file = saved[-1] / "progress.json"
        progress = msgspec.json.decode(file.read_bytes(), type=Progress)
        part = file.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(msgspec.structs.replace(progress, position=position)))
        part.replace(file)

    def resume(self, learner: Learner) -> Progress | None:
        """Put the newest checkpoint into the learner; where the run's optimizer is another one now, it starts anew.

        Raises:
            ResumeError: it is of another target, of a draft of another shape, or of another version of this program.
        """
        if not (saved := self._saved()):
            return None
        folder = saved[-1]
        try:
            progress = msgspec.json.decode((folder / "progress.json").read_bytes(), type=Progress)
        except msgspec.ValidationError as error:
            raise ResumeError(
                f"checkpoint {folder} was written by another version of sglang-specforge ({error}); give another run "
                "folder"
            ) from error
        if progress.target_fingerprint != self._job.target_fingerprint:
            raise ResumeError(
                f"checkpoint {folder} is of target {progress.target_fingerprint}, this run's is "
                f"{self._job.target_fingerprint}; give another run folder"
            )
        model, optimizer = get_state_dict(learner.draft, learner.optimizers)
        same = progress.optimizer in (None, wanted := self._job.settings.optimizer)
        if not same:
            logger.warning("draft training: %s starts anew: the checkpoint's is %s", wanted, progress.optimizer)
        try:
            dcp.load({"model": model, "optimizer": optimizer} if same else {"model": model}, checkpoint_id=folder)
        except dcp.api.CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise ResumeError(
                f"checkpoint {folder} does not fit the draft and its optimizer; give another run folder: {reason}"
            ) from error
        set_state_dict(learner.draft, learner.optimizers, model_state_dict=model, optim_state_dict=optimizer)
        for group in (group for each in learner.optimizers for group in each.param_groups):
            group["weight_decay"] = self._job.settings.weight_decay  # this run's; the state has the checkpoint's
        if _rng_file(folder).exists():  # more processes than there were have no state to go on from
            torch.set_rng_state(load_file(_rng_file(folder))["cpu"])
        learner.step, learner.begun = progress.step, progress.begun
        if len(progress.acceptance_K) == len(learner.acceptance_K):
            learner.acceptance_K = progress.acceptance_K
        logger.info("draft training: resumed from step %d", progress.step)
        return progress

    def _saved(self) -> list[Path]:
        return sorted(p for p in self._root.glob("*") if p.name.isdigit())


def _rng_file(folder: Path) -> Path:
    return folder / f"rng_{dist.get_rank()}.safetensors"
