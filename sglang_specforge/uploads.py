"""Checkpoints that come over HTTP, or from other trainers: in ``uploads/`` of the run folder until they are a version,
or too old."""

import contextlib
import shutil
import uuid
from pathlib import Path
from typing import IO

from sglang_specforge.checkpoint import CheckpointError, load_config

_KEPT = 4


class Uploads:
    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "uploads"

    def new(self) -> Path:
        """A folder that is not there yet."""
        return self._folder / uuid.uuid4().hex

    def save(self, config: IO[bytes], weights: IO[bytes]) -> Path:
        """Returns the checkpoint's folder. Raises CheckpointError: it cannot be written, or its config not be read."""
        checkpoint = self.new()
        try:
            checkpoint.mkdir(parents=True)
            for name, source in {"model.safetensors": weights, "config.json": config}.items():
                with (checkpoint / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
            load_config(checkpoint)
        except OSError as error:
            self.forget(checkpoint)
            raise CheckpointError(f"the upload cannot be written to {self._folder}: {error.strerror}") from error
        except CheckpointError:
            self.forget(checkpoint)
            raise
        with contextlib.suppress(OSError):  # another call may be at it
            for old in sorted(self._folder.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-_KEPT]:
                self.forget(old)
        return checkpoint

    def forget(self, checkpoint: Path) -> None:
        """Delete it, where it is an upload."""
        if checkpoint.parent == self._folder:
            shutil.rmtree(checkpoint, ignore_errors=True)
