"""The run folder's published drafts: ``versions/000001``, ``versions/000002`` and so on, each a checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import torch

from sglang_specforge.checkpoint import save_checkpoint


class VersionFolder:
    """Numbers only grow, also over restarts; a version without ``config.json`` is not there yet."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "versions"

    def path(self, version: int) -> Path:
        return self.root / f"{version:06d}"

    def published(self) -> list[int]:
        """Complete versions, oldest first."""
        return sorted(int(p.parent.name) for p in self.root.glob("*/config.json") if p.parent.name.isdigit())

    def newest(self) -> int | None:
        return max(self.published(), default=None)

    def publish(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], keep: int) -> int:
        """Write the next version, delete all but the newest ``keep``; returns its number."""
        version = (self.newest() or 0) + 1
        save_checkpoint(self.path(version), config, tensors)
        for old in self.published()[:-keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return version
