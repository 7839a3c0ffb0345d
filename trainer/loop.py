"""The trainer's main loop: draw a step's samples, learn from them, publish what was learnt."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_specforge.checkpoint import CheckpointError, noted_content
from sglang_specforge.contracts.control import Verdict
from sglang_specforge.training_settings import Job
from sglang_specforge.versions import VersionFolder
from trainer.evaluate import Evaluated, Simulated, by_slice
from trainer.gate import Judged, compare
from trainer.learner import Learner, Trained
from trainer.resume import Checkpoints, Position
from trainer.sample import Sample
from trainer.share import gather, tell

logger = logging.getLogger(__name__)

_WORSE_VERSIONS = 3  # in succession, after which training goes on from the draft in service


class Source(Protocol):
    """Where samples come from, and who hears of what was learnt. ``draw`` and ``held_out`` are called by all processes
    together, the others by the first one alone."""

    def draw(self) -> list[list[Sample]] | None:
        """This process's passes of the next step; None where there is nothing to learn from now."""

    def held_out(self) -> list[list[Sample]]:
        """This process's samples to evaluate on, in passes of one sample or none."""

    def is_finished(self) -> bool: ...
    def wants_version(self, step: int) -> bool: ...
    def position(self) -> Position: ...
    def trained(self, result: Trained) -> None: ...
    def rival(self) -> Path | None:
        """Checkpoint of the draft in service, that a new version is compared with; None where there is none."""

    def published(self, version: int, step: int, evaluated: Evaluated) -> None: ...
    def better_vocabulary(self, t2d_V: Tensor) -> Tensor | None:
        """Target ids that the draft should say, int64 [D], where those that it says (bool [V]) are not good enough."""

    def beat(self, learning: bool) -> None: ...
    def close(self) -> None: ...


class Trainer:
    """Publishing also checkpoints, so that a published version can be gone on from."""

    def __init__(
        self,
        job: Job,
        learner: Learner,
        source: Source,
        told_to_stop: Callable[[], bool],
        best: float | None = None,
    ) -> None:
        self._job, self._learner, self._source, self._told_to_stop = job, learner, source, told_to_stop
        self._checkpoints, self._versions = Checkpoints(job), VersionFolder(job.run_dir)
        self._first = dist.get_rank() == 0
        self._saved_step = learner.step
        self._best = best  # acceptance length of the best version so far
        self._worse = 0  # versions in succession

    def run(self) -> None:
        """Until the source is finished or the process is told to stop; then saves."""
        while not self._any(self._told_to_stop() or self._source.is_finished()):
            passes = self._source.draw()
            if passes is not None:
                result = self._learner.train(passes)
                if self._first:
                    self._source.trained(result)
                if self._any(self._first and self._source.wants_version(result.step)):
                    self._publish()
                    self._follow_vocabulary()
            if self._first:
                self._source.beat(passes is not None)
        if self._saved_step != self._learner.step:
            self._save()
        else:
            self._checkpoints.note(self._source.position())  # the account goes on between steps
        self._source.close()

    def _publish(self) -> None:
        held_out = self._source.held_out()
        found = self._learner.simulate(held_out)
        slices = by_slice(found)
        overall = sum(slices.values(), Simulated.nothing(self._job.speculation.steps))
        rival = self._rival()
        evaluated = Evaluated(overall, slices, rival and self._judge(held_out, found, rival))
        tensors = self._learner.export()
        version = None
        if self._first:
            # A restarted trainer reads the configuration of the draft that it started with.
            spared = [self._job.version_path(0), self._versions.best(), rival]
            version = self._versions.publish(
                self._learner.config, tensors, keep=self._job.settings.keep_versions, spared=spared
            )
            if overall.length is not None and overall.length > (self._best or 0.0):
                self._best = overall.length
                self._versions.mark_best(version)
        self._take_up_better(rival, evaluated.verdict)
        self._save()
        if version is not None:
            self._source.published(version, self._learner.step, evaluated)

    def _rival(self) -> Path | None:
        found = tell(str(self._source.rival() or "") if self._first else None)
        return Path(found) if found else None

    def _judge(self, held_out: list[list[Sample]], found: Judged, rival: Path) -> Verdict:
        settings = self._job.settings
        try:
            served = self._learner.simulate(held_out, rival)
        except CheckpointError as error:  # all processes read the same file
            return Verdict(samples=0, passed=False, why=f"the served draft cannot be compared with: {error}")
        verdict = compare(found, served, settings.gate_confidence, settings.gate_slice_loss)
        return msgspec.structs.replace(verdict, against=noted_content(rival))

    def _take_up_better(self, served: Path | None, verdict: Verdict | None) -> None:
        """One that an operator put into service, or what was there before training went wrong. What is a little worse
        is left to learn: the draft in service is the best of many."""
        is_worse = verdict is not None and verdict.least_loss > self._job.settings.take_up_loss
        self._worse = self._worse + 1 if is_worse else 0
        if self._worse < _WORSE_VERSIONS:
            return
        self._worse = 0
        try:
            self._learner.take_up(served)
        except CheckpointError as error:
            logger.error("draft training: the draft in service cannot be gone on from: %s", error)

    def _follow_vocabulary(self) -> None:
        """The next version may say other tokens than the one before."""
        found_D = self._source.better_vocabulary(self._learner.draft.t2d.cpu()) if self._first else None
        ids, *_ = gather(None if found_D is None else found_D.tolist(), list[int] | None)
        if ids is not None:
            self._learner.choose_vocabulary(torch.tensor(ids))

    def _save(self) -> None:
        self._checkpoints.save(self._learner, self._source.position(), self._best)
        self._saved_step = self._learner.step

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all have to do the same next."""
        if dist.get_world_size() == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen)
