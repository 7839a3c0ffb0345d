"""Training on a stored dataset: epochs in a shuffled order that a restart goes on with exactly."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from sglang_specforge.new_draft import Recipe
from sglang_specforge.training_settings import Speculation, TrainingSettings
from trainer.deal import deal
from trainer.evaluate import Evaluated
from trainer.learner import Trained
from trainer.offline.layout import DatasetError
from trainer.offline.progress import ProgressLine
from trainer.offline.reader import Entry, StoredSamples
from trainer.resume import OfflinePosition, Position
from trainer.sample import Sample
from trainer.trackers import Trackers

logger = logging.getLogger(__name__)


class OfflineSettings(TrainingSettings):
    """``python -m trainer --data DIR``: each field is the flag ``--<name>``."""

    data: Path = Field(description="Folder that `sglang-specforge capture` wrote.")
    target: Path | None = Field(None, description="Folder of the target; unset: where the captured server had it.")
    draft: Path | None = Field(None, description="Checkpoint to start from; unset: a random draft.")
    recipe: Recipe = Field("eagle3", description="Kind of a random draft.")
    draft_vocab_size: int = Field(
        32_000, ge=8, description="Draft vocabulary of a random draft: the most frequent tokens."
    )
    draft_steps: int = Field(
        3, ge=1, le=16, description="Draft tokens one after another that evaluation simulates, as the server will."
    )
    draft_topk: int = Field(1, ge=1, le=16, description="Branches of each of those; above 1, a tree.")
    draft_tokens: int | None = Field(None, description="Rows of a verification of a tree.")
    epochs: int = Field(1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Steps after which training ends, whatever the epochs.")
    holdout_every: int = Field(20, ge=2, description="One sample in so many is held out for evaluation.")
    evaluated_samples: int = Field(64, ge=1, description="Held-out samples of an evaluation.")
    publish_every_steps: int = Field(1000, ge=1, description="Steps between two versions, each with a checkpoint.")

    @property
    def speculation(self) -> Speculation:
        """What evaluation simulates."""
        return Speculation(self.draft_steps, self.draft_topk, self.draft_tokens)

    @model_validator(mode="after")
    def _check_tree(self) -> "OfflineSettings":
        Speculation(self.draft_steps, self.draft_topk, self.draft_tokens)
        return self


class Split(NamedTuple):
    """Held-out samples are chosen by their ids, so that data captured later changes nothing about them."""

    training: list[Entry]
    held_out: list[Entry]

    @classmethod
    def of(cls, entries: list[Entry], holdout_every: int) -> "Split":
        split = cls([], [])
        for entry in entries:
            split[int(entry.id[:8], 16) % holdout_every == 0].append(entry)
        return split

    def check(self, weighted: Iterable[str] = ()) -> "Split":
        """Raises DatasetError where there is nothing to train on, or nothing of a slice that is weighted."""
        if not self.training:
            raise DatasetError(
                f"all {len(self.held_out)} samples are held out; give a higher holdout_every, or more data"
            )
        slices = {entry.slice for entry in self.training}
        if unknown := sorted(set(weighted) - slices):
            raise DatasetError(f"slice_weights: the data has no slice {unknown[0]!r}; it has {sorted(slices)}")
        return self

    def planned_steps(self, settings: OfflineSettings) -> int:
        """About how many steps there are in all."""
        weights = settings.slice_weights
        tokens = int(settings.epochs * sum(weights.get(entry.slice, 1.0) * entry.length for entry in self.training))
        steps = -(-tokens // settings.batch_tokens)
        return min(steps, settings.max_steps or steps)


class OfflineSource:
    """Every process reads what it was dealt by itself, as all work out the same order."""

    def __init__(
        self,
        settings: OfflineSettings,
        samples: StoredSamples,
        split: Split,
        position: Position | None,
        trackers: Trackers | None,
        step: int,
    ) -> None:
        self._settings, self._samples, self._trackers = settings, samples, trackers
        self._training, self._held_out = split.training, split.held_out[: settings.evaluated_samples]
        self._position = _same_order(position, self._order_digest()) or OfflinePosition(dataset=self._order_digest())
        self._order = self._shuffled(self._position.epoch)
        self._step = step
        self._progress = ProgressLine(split.planned_steps(settings)) if dist.get_rank() == 0 else None

    def draw(self) -> list[list[Sample]] | None:
        batch = self._next_batch()
        lengths = [entry.length for entry in batch]
        own = deal(lengths, dist.get_world_size(), self._settings.micro_batch_tokens)[dist.get_rank()]
        self._step += 1
        # A damaged sample leaves its pass, which the other processes make all the same.
        return [self._load([batch[i] for i in indices]) for indices in own]

    def held_out(self) -> list[list[Sample]]:
        own = deal([e.length for e in self._held_out], dist.get_world_size(), pass_tokens=1)[dist.get_rank()]
        return [self._load([self._held_out[i] for i in indices]) for indices in own] if self._held_out else []

    def is_finished(self) -> bool:
        return self._position.epoch >= self._settings.epochs or self._step >= (self._settings.max_steps or 1 << 62)

    def wants_version(self, step: int) -> bool:
        return step % self._settings.publish_every_steps == 0 or self.is_finished()

    def position(self) -> Position:
        self._position.damaged = self._samples.damaged
        return self._position

    def trained(self, result: Trained) -> None:
        self._trackers.log(result)
        self._progress.trained(result)

    def rival(self) -> Path | None:
        return None

    def published(self, version: int, step: int, evaluated: Evaluated) -> None:
        self._trackers.log_version(version, step, evaluated)
        self._progress.published(version, step, evaluated.overall)

    def better_vocabulary(self, t2d_V: Tensor) -> Tensor | None:
        return None  # a random draft's was chosen by all of the data

    def beat(self, learning: bool) -> None:
        pass

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
            self._progress.close(self._samples.damaged)

    def _next_batch(self) -> list[Entry]:
        """At most ``batch_tokens`` tokens (or one sample that is longer), in the epoch's order."""
        batch: list[Entry] = []
        tokens, position = 0, self._position
        while position.index < len(self._order):
            entry = self._order[position.index]
            tokens += entry.length
            if batch and tokens > self._settings.batch_tokens:
                break
            batch.append(entry)
            position.index += 1
        if position.index == len(self._order):
            position.epoch, position.index = position.epoch + 1, 0
            self._order = self._shuffled(position.epoch)
        return batch

    def _shuffled(self, epoch: int) -> list[Entry]:
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        weights = self._settings.slice_weights
        weight_S = torch.tensor([weights.get(entry.slice, 1.0) for entry in self._training], dtype=torch.float64)
        # A weight of 2.3 is two times, and a third with chance 0.3.
        times_S = (weight_S + torch.rand(len(weight_S), generator=generator, dtype=torch.float64)).long()
        drawn = torch.arange(len(times_S)).repeat_interleave(times_S)
        return [self._training[drawn[i]] for i in torch.randperm(len(drawn), generator=generator)]

    def _order_digest(self) -> str:
        settings = self._settings
        return f"{self._samples.digest}/{settings.seed}/{settings.holdout_every}/{settings.slice_weights}"

    def _load(self, entries: list[Entry]) -> list[Sample]:
        return [sample for entry in entries if (sample := self._samples.load(entry)) is not None]


def _same_order(position: Position | None, digest: str) -> OfflinePosition | None:
    if isinstance(position, OfflinePosition):
        if position.dataset == digest:
            return position
        logger.warning("draft training: the data or its order changed since the checkpoint; the epoch starts anew")
    return None
