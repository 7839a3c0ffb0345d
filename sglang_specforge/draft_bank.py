"""Draft versions resident in this rank, one of them active. A swap is a copy between two steps."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from sglang_specforge.checkpoint import CheckpointError, load_checked, load_config
from sglang_specforge.settings import Run

logger = logging.getLogger(__name__)

_REFUSALS = 32  # that are remembered


class SwappableDraft(Protocol):
    """The live draft of this rank."""

    def load_shadows(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]: ...
    def copy_in(self, shadows: dict[str, torch.Tensor]) -> None: ...
    def copy_out(self) -> dict[str, torch.Tensor]: ...
    def release(self, shadows: dict[str, torch.Tensor]) -> None: ...


class DraftBank:
    """Loads in a background thread; the scheduler activates between two steps.

    Which versions are loaded, evicted and activated is decided once for all ranks (``sglang_specforge.swaps``).
    """

    def __init__(self, live: SwappableDraft, run: Run, replica: int) -> None:
        self.replica, self.active_version = replica, run.draft_version
        self.window = 0  # of an A/B; 0: none
        self._live, self._run = live, run
        self._config = load_config(run.version_path(run.draft_version))
        self._resident: dict[int, dict[str, torch.Tensor]] = {}
        self._swaps = self._active_since_step = 0
        self._longest_swap_s = 0.0  # of the scheduler thread; on CUDA, until the copies are queued
        self._refused: dict[int, str] = {}

    def load(self, version: int) -> None:
        """Start making a version of the run's folder resident; returns at once (scheduler thread)."""
        if not self._resident:  # the live draft is all there is of the first version
            self._resident[self.active_version] = self._live.copy_out()
        self._refused.pop(version, None)
        if version not in self._resident:
            threading.Thread(target=self._load, args=(version,), name=f"specforge-load-{version}", daemon=True).start()

    def evict(self, version: int) -> None:
        """Forget a version, whether it is resident or not."""
        if (shadows := self._resident.pop(version, None)) is not None:
            self._live.release(shadows)

    def is_resident(self, version: int) -> bool:
        return version in self._resident or version == self.active_version

    def refuse(self, version: int, why: str) -> None:
        """Remember why a version cannot be activated."""
        self._refused[version] = why
        if len(self._refused) > _REFUSALS:
            del self._refused[min(self._refused)]
        logger.error("draft training: version %d refused: %s", version, why)

    def refuses(self, version: int) -> bool:
        return version in self._refused

    def activate(self, version: int, step: int) -> None:
        """Copy a resident version in place, before the scheduler's step ``step``; the caller made sure that it is
        resident on every rank."""
        begun_s = time.perf_counter()
        if version in self._resident:  # else it is the first, and live
            self._live.copy_in(self._resident[version])
        self._longest_swap_s = max(self._longest_swap_s, time.perf_counter() - begun_s)
        if version != self.active_version:
            logger.info("draft training: version %d is active", version)
        self.active_version, self._active_since_step = version, step
        self._swaps += 1

    def status(self) -> dict[str, Any]:
        return {
            "replica": self.replica,
            "active_version": self.active_version,
            "active_since_step": self._active_since_step,
            "resident_versions": sorted({*self._resident, self.active_version}),
            "swaps": self._swaps,
            "longest_swap_s": self._longest_swap_s,
            "refused": {str(v): why for v, why in list(self._refused.items())},
        }

    def _load(self, version: int) -> None:
        try:
            tensors = load_checked(self._run.version_path(version), self._config, self._run.target_fingerprint)
            self._resident[version] = self._live.load_shadows(paced(tensors, self._run.settings.bank_load_max_mb_s))
        except CheckpointError as error:
            self.refuse(version, str(error))
        except Exception as error:  # out of memory, a loader's refusal: whoever waits for the version has to hear of it
            logger.exception("draft training: loading version %d", version)
            self.refuse(version, f"{type(error).__name__}: {error}")


def paced(tensors: dict[str, torch.Tensor], max_mb_s: float | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by name, each when those before it may have been copied at ``max_mb_s`` MiB/s; None: no limit."""
    begun_s, passed_bytes = time.monotonic(), 0
    for name, tensor in tensors.items():
        if max_mb_s is not None:
            time.sleep(max(0.0, begun_s + passed_bytes / (max_mb_s * (1 << 20)) - time.monotonic()))
        yield name, tensor
        passed_bytes += tensor.nbytes
