"""The run folder's published drafts: ``versions/000001``, ``versions/000002`` and so on, each a checkpoint."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sglang_specforge.checkpoint import (
    CONTENT_KEY,
    CheckpointError,
    content_of,
    load_config,
    save_checkpoint,
    save_config,
)
from sglang_specforge.manifest import Manifest


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

    def last_active(self) -> int:
        """What the run folder's server had active last; 0: the draft that it started with. Where no server has noted
        that, or its version is gone, the newest.

        Raises:
            CheckpointError: the note cannot be read.
        """
        noted = Manifest.load(self.root).active if (self.root / "manifest.json").exists() else None
        return noted if noted in (0, *self.published()) else self.newest() or 0

    def publish(
        self, config: dict[str, Any], tensors: dict[str, torch.Tensor], keep: int, spared: Collection[Path | None] = ()
    ) -> int:
        """Write the next version, delete all but the newest ``keep``, those in use and ``spared``; returns its
        number."""
        version = self._claim()
        save_checkpoint(self.path(version), config, tensors)
        self._prune(keep, spared)
        return version

    def best(self) -> Path | None:
        """The version that did best on held-out samples."""
        link = self.root / "best"
        return link.resolve() if link.exists() else None

    def mark_best(self, version: int) -> None:
        """Point ``versions/best`` at a version, all at once."""
        part = self.root / "best.part"
        part.unlink(missing_ok=True)
        part.symlink_to(self.path(version).name)
        os.replace(part, self.root / "best")

    def number(self, checkpoint: Path) -> int | None:
        """Of a version in this folder; None for any other checkpoint."""
        ours = checkpoint.parent == self.root and checkpoint.name.isdigit()
        return int(checkpoint.name) if ours else None

    def adopt(self, checkpoint: Path, keep: int) -> int:
        """Copy a checkpoint from elsewhere in as the next version, and delete like ``publish``; returns its number, or
        that of the version which it already is.

        Raises:
            CheckpointError: there is none, or no room for a copy.
        """
        config = load_config(checkpoint)
        try:
            config = {**config, CONTENT_KEY: content_of(checkpoint)}
        except OSError as error:
            raise CheckpointError(
                f"draft checkpoint {checkpoint}: model.safetensors cannot be read: {error}"
            ) from error
        for known in reversed(self.published()):
            if load_config(self.path(known)) == config:
                return known
        version = None
        try:
            version = self._claim()
            shutil.copyfile(checkpoint / "model.safetensors", self.path(version) / "model.safetensors")
            save_config(self.path(version), config)
        except OSError as error:
            if version is not None:
                shutil.rmtree(self.path(version), ignore_errors=True)
            raise CheckpointError(f"draft checkpoint {checkpoint} cannot be copied to {self.root}: {error}") from error
        self._prune(keep)
        return version

    def _prune(self, keep: int, spared: Collection[Path | None] = ()) -> None:
        in_use = Manifest.load(self.root).in_use
        for old in self.published()[:-keep]:
            if old not in in_use and self.path(old) not in spared:
                shutil.rmtree(self.path(old), ignore_errors=True)

    def _claim(self) -> int:
        """A folder of the next number, made by this call alone: trainer and server both add versions."""
        self.root.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in self.root.iterdir() if p.name.isdigit()]
        version = max(taken, default=0) + 1
        while True:
            try:
                self.path(version).mkdir()
                return version
            except FileExistsError:
                version += 1
