"""Draft versions resident in this rank: one is active, one may be staged. A swap is a copy between two steps."""

import logging
import threading
from typing import Any, Protocol

import torch

from sglang_specforge.checkpoint import CheckpointError, load_checked, load_config
from sglang_specforge.settings import Run

logger = logging.getLogger(__name__)

_REFUSALS = 32  # that are remembered


class SwappableDraft(Protocol):
    """The live draft of this rank."""

    def load_shadows(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def copy_in(self, shadows: dict[str, torch.Tensor]) -> None: ...


class DraftBank:
    """Stages in a background thread; activation is called by the scheduler between two steps."""

    def __init__(self, live: SwappableDraft, run: Run) -> None:
        self.active_version = 0
        self._live, self._run = live, run
        self._config = load_config(run.version_path(0))
        self._staged: tuple[int, dict[str, torch.Tensor]] | None = None
        self._swaps = 0
        self._refused: dict[int, str] = {}

    def stage(self, version: int) -> None:
        """Start loading a version from the run's folder; returns at once."""
        threading.Thread(target=self._load, args=(version,), name=f"specforge-stage-{version}", daemon=True).start()

    def is_staged(self, version: int) -> bool:
        return self._staged is not None and self._staged[0] == version

    def activate(self, version: int) -> None:
        """Copy a staged version in place; the caller made sure that every rank has staged it."""
        _, shadows = self._staged
        self._live.copy_in(shadows)
        self.active_version, self._staged = version, None
        self._swaps += 1
        logger.info("draft training: version %d is active", version)

    def status(self) -> dict[str, Any]:
        return {
            "active_version": self.active_version,
            "staged_version": self._staged[0] if self._staged else None,
            "swaps": self._swaps,
            "refused": {str(v): why for v, why in list(self._refused.items())},
        }

    def _load(self, version: int) -> None:
        try:
            tensors = load_checked(self._run.version_path(version), self._config, self._run.target_fingerprint)
            self._staged = (version, self._live.load_shadows(tensors))
        except (CheckpointError, RuntimeError) as error:  # RuntimeError: out of memory, a loader's refusal
            self._refused[version] = str(error)
            if len(self._refused) > _REFUSALS:
                del self._refused[min(self._refused)]
            logger.error("draft training: version %d refused: %s", version, error)
