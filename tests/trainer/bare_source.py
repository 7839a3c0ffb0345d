"""What the trainer's loop asks of a source, for tests that care for some of it."""

from typing import Any

from trainer.learner import Learner
from trainer.resume import OfflinePosition


class BareSource:
    """A ``trainer.loop.Source`` of a number of steps, in which nobody hears of anything."""

    def __init__(self, learner: Learner, steps: int) -> None:
        self.learner, self._steps = learner, steps

    def is_finished(self):
        return self.learner.step == self._steps

    def held_out(self):
        return []

    def position(self):
        return OfflinePosition(dataset="d")

    def rival(self):
        return None

    def better_vocabulary(self, t2d_V):
        return None

    def published(self, version: int, step: int, evaluated: Any) -> None:
        pass

    def beat(self, learning: bool) -> None:
        pass

    def close(self) -> None:
        pass
