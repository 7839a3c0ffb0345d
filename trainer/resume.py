"""Checkpoints of the training itself, under ``<run_dir>/checkpoints``: weights, optimizer, counters."""

import logging
import shutil
from pathlib import Path

import msgspec
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sglang_specforge.contracts.control import Parity, TokenLedger
from sglang_specforge.settings import Run
from trainer.learner import Learner

logger = logging.getLogger(__name__)

_KEPT = 2


class Progress(msgspec.Struct, kw_only=True):
    """What is not a tensor. The ledger belongs to one life of the server, known by its endpoint."""

    step: int
    target_fingerprint: str
    spans_endpoint: str
    ledger: TokenLedger
    parity: Parity


class ResumeError(RuntimeError):
    """The newest checkpoint does not belong to this run."""


class Checkpoints:
    """Writes and finds them; a checkpoint counts once its folder has its final name."""

    def __init__(self, run: Run) -> None:
        self._run, self._root = run, run.run_dir / "checkpoints"

    def save(self, learner: Learner, ledger: TokenLedger, parity: Parity) -> None:
        model, optimizer = get_state_dict(learner.draft, learner.optimizer)
        folder = self._root / f"{learner.step:09d}"
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=part)
        progress = Progress(
            step=learner.step,
            target_fingerprint=self._run.target_fingerprint,
            spans_endpoint=self._run.spans_endpoint,
            ledger=ledger,
            parity=parity,
        )
        (part / "progress.json").write_bytes(msgspec.json.encode(progress))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in self._saved()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self, learner: Learner) -> Progress | None:
        """Put the newest checkpoint into the learner. The ledger goes on only within one life of the server.

        Raises:
            ResumeError: it is of another target, or of a draft of another shape.
        """
        if not (saved := self._saved()):
            return None
        folder = saved[-1]
        progress = msgspec.json.decode((folder / "progress.json").read_bytes(), type=Progress)
        if progress.target_fingerprint != self._run.target_fingerprint:
            raise ResumeError(
                f"checkpoint {folder} is of target {progress.target_fingerprint}, served is "
                f"{self._run.target_fingerprint}; give another --draft-training-run-dir"
            )
        model, optimizer = get_state_dict(learner.draft, learner.optimizer)
        state = {"model": model, "optimizer": optimizer}
        try:
            dcp.load(state, checkpoint_id=folder)
        except dcp.api.CheckpointException as error:
            raise ResumeError(
                f"checkpoint {folder} does not fit the served draft; give another --draft-training-run-dir: {error}"
            ) from error
        set_state_dict(
            learner.draft, learner.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        learner.step = progress.step
        logger.info("draft training: resumed from step %d", progress.step)
        if progress.spans_endpoint != self._run.spans_endpoint:
            progress.ledger, progress.parity = TokenLedger(), Parity()
        return progress

    def _saved(self) -> list[Path]:
        return sorted(p for p in self._root.glob("*") if p.name.isdigit())
