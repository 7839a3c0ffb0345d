"""The record of every change of the served draft: ``<run_dir>/audit.jsonl``, one JSON object a line, only added to."""

import json
import logging
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class AuditLog:
    """Of one run folder; a line is on its way to the disk before the call returns."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "audit.jsonl"

    def write(self, event: str, who: str, **facts: Any) -> None:
        """Add an event: what happened, who asked for it, and what belongs to it. A disk that takes no line does not
        stop the change; the server's log has it then."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "who": who, **facts}
        line = json.dumps(entry, default=str) + "\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())  # in one piece: whoever else adds a line does not cut it
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.error("draft training: %s takes no line (%s): %s", self._file, error, line.rstrip())

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest events, oldest first."""
        try:
            with self._file.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in deque(lines, maxlen=count)]
        except FileNotFoundError:
            return []
