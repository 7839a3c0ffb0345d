"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases where the settings name them."""

import json
from pathlib import Path
from typing import Any

from sglang_specforge.training_settings import TrainingSettings
from trainer.evaluate import Evaluated
from trainer.learner import Trained


class MissingTracker(RuntimeError):
    """A tracker that the settings name is not installed; the message says what to install."""


class Trackers:
    """A line a step in ``<run_dir>/metrics.jsonl``; lines past ``step``, of a life that was cut off, are taken back."""

    def __init__(self, settings: TrainingSettings, step: int) -> None:
        run_dir = settings.run_dir.absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run_dir / "metrics.jsonl"
        _keep_until(file, step)
        self._lines = file.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir, step) if "tensorboard" in settings.trackers else None
        self._wandb = _wandb(run_dir, settings) if "wandb" in settings.trackers else None

    def log(self, result: Trained) -> None:
        accuracy = {f"accuracy_{k}": value for k, value in enumerate(result.accuracy_K)}
        metrics = {"loss": result.loss, "grad_norm": result.grad_norm, "tokens": result.tokens, **accuracy}
        if len(result.tokens_by_rank) > 1:
            metrics |= {f"tokens_rank_{rank}": tokens for rank, tokens in enumerate(result.tokens_by_rank)}
        if result.mfu is not None:
            metrics["mfu"] = result.mfu
        rare = {"skipped_steps": result.skipped_steps, "taken_up": result.taken_up}
        metrics |= {name: count for name, count in rare.items() if count}
        self._write(result.step, metrics)

    def log_version(self, version: int, step: int, evaluated: Evaluated) -> None:
        """Held-out acceptance: its length, its rate at each place, its length for each slice that has a name, and the
        gain over the draft in service."""
        metrics: dict[str, Any] = {"version": version}
        simulated = evaluated.overall
        if simulated.length is not None:
            metrics["held_out_acceptance_length"] = simulated.length
            metrics |= {f"held_out_acceptance_{k}": rate for k, rate in enumerate(simulated.by_position)}
        named = {name: found.length for name, found in evaluated.slices.items() if name}
        metrics |= {f"held_out_acceptance_length/{name}": length for name, length in named.items()}
        if (verdict := evaluated.verdict) is not None and verdict.gain is not None:
            metrics |= {"held_out_gain": verdict.gain, "held_out_gain_low": verdict.low}
        self._write(step, metrics)

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        """What is not known (None) is left out: of trackers, only JSON has a word for it."""
        metrics = {name: value for name, value in metrics.items() if value is not None}
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)


def _keep_until(file: Path, step: int) -> None:
    """Drop lines of later steps, and a last line that was cut off in writing."""
    if not file.exists():
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    part = file.with_suffix(".part")
    part.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
    part.replace(file)


def _tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingTracker("trackers names tensorboard, which is not installed; pip install tensorboard") from error
    return SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)


def _wandb(run_dir: Path, settings: TrainingSettings) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingTracker("trackers names wandb, which is not installed; pip install wandb") from error
    return wandb.init(dir=run_dir, project="sglang-specforge", resume="allow", config=settings.model_dump(mode="json"))
