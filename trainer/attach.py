"""Servers that this trainer was pointed at: found over HTTP, and looked for again when they are gone."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from pydantic import BeforeValidator, Field

from sglang_specforge.client import Unanswered, request, run_of
from sglang_specforge.new_draft import import_draft
from sglang_specforge.settings import OnlineSettings, Run
from sglang_specforge.training_settings import Job
from sglang_specforge.versions import VersionFolder
from trainer.share import tell

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
_ALIKE = ("target_fingerprint", "served_dtype", "speculation")  # of all servers


def _addresses(given: object) -> object:
    """Each address once, without a slash at its end."""
    given = given.split(",") if isinstance(given, str) else given
    return list(dict.fromkeys(str(url).strip().rstrip("/") for url in given))


class AttachSettings(OnlineSettings):
    """``python -m trainer attach``: each field is the flag ``--<name>``."""

    servers: Annotated[tuple[str, ...], BeforeValidator(_addresses)] = Field(
        min_length=1,
        description="Address of a server to train on; give the flag again for each.",
        json_schema_extra={"flag": "server", "repeats": True},
    )
    run_dir: Path = Field(Path("draft-training-attached"), description="Folder for checkpoints and published versions.")


class CannotAttach(RuntimeError):
    """A server cannot be trained on, or not beside the others; the message says why."""


class Watch:
    """What one address says of itself."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url, self._api_key = url, api_key
        self.run: Run | None = None  # the newest that it told of
        self.silence = ""  # why it does not answer now
        self.moved: dict[str, float] = {}  # as ``online.Servers`` has it

    def start(self) -> None:
        threading.Thread(target=self._keep_looking, name=f"specforge-watch-{self.url}", daemon=True).start()

    def look(self) -> None:
        try:
            self.run, silence = run_of(self.url, self._api_key), ""
            moved = self._status()["draft"]["drift"]["moved"]
            self.moved = {name: time.time() - move["since_s"] for name, move in moved.items()}
        except Unanswered as error:
            silence = str(error)
        if silence and not self.silence:
            logger.warning("draft training: %s; it is asked again until it does", silence)
        elif self.silence and not silence:
            logger.info("draft training: the server at %s answers", self.url)
        self.silence = silence

    def active_version(self) -> int:
        return self._status()["draft"]["active_version"]

    def _status(self) -> dict[str, Any]:
        return request("GET", self.url, "/draft/status", self._api_key, timeout=10).json()

    def _keep_looking(self) -> None:
        wait = threading.Event()
        while not wait.wait(_LOOK_EVERY_S):
            self.look()


class AttachedServers:
    """``online.Servers``: each is asked about itself now and then, in a thread; no watches in the processes that
    hold no stream."""

    def __init__(self, job: Job, watches: Sequence[Watch]) -> None:
        self._job, self._watches, self._parent_pid = job, watches, os.getppid()
        self._refused: set[str] = set()
        for watch in watches:
            watch.start()

    def check(self) -> "AttachedServers":
        """Raises CannotAttach where a server that answers cannot be trained on."""
        for watch in self._watches:
            if watch.run and (problem := self._problem(watch.run)):
                raise CannotAttach(f"the server at {watch.url} {problem}")
        return self

    def runs(self) -> list[Run]:
        runs = []
        for watch in self._watches:
            if (run := watch.run) is None:
                continue
            problem = None if watch.silence else self._problem(run)  # one that is silent is as it was
            if problem is None:
                runs.append(run)
            elif run.spans_endpoint not in self._refused:
                self._refused.add(run.spans_endpoint)
                logger.error("draft training: a server is left out: the one at %s %s", watch.url, problem)
        return runs

    def are_gone(self) -> bool:
        """Servers may come back at any time, but a process without its launcher has to end."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent_pid

    def served(self) -> int | None:
        return None

    def moved(self) -> dict[str, float]:
        """Where several servers say it of a slice, since the latest."""
        moves = [move for watch in self._watches for move in watch.moved.items()]
        return dict(sorted(moves, key=lambda move: move[1]))

    def _problem(self, run: Run) -> str | None:
        for name in _ALIKE:
            if (found := getattr(run, name)) != (expected := getattr(self._job, name)):
                return f"has {name} {found}, and this training's is {expected}; give it a trainer of its own"
        if run.run_dir == self._job.run_dir:
            return f"keeps its own versions in {run.run_dir}; give another --run-dir"
        if not Path(run.spans_endpoint.removeprefix("ipc://")).parent.is_dir():
            return (
                f"streams to {run.spans_endpoint}, which is not there for this process: it runs on another machine or "
                "in another container; start the trainer beside it, as the same user"
            )
        return None


def attach(settings: AttachSettings, api_key: str | None) -> tuple[Job, AttachedServers]:
    """Find the servers, and begin with the draft that the first of them serves. All processes call together.

    Raises:
        Unanswered: none of them answers.
        CannotAttach: one that answers cannot be trained on with this job.
    """
    watches = [Watch(url, api_key) for url in settings.servers] if dist.get_rank() == 0 else []
    draft = VersionFolder(settings.run_dir.absolute()).root / "initial"
    told = None
    if watches:
        first = _first_that_answers(watches)
        if not (draft / "config.json").exists():
            import_draft(first.run.version_path(first.active_version()), Path(first.run.target_path), draft)
        told = first.run.model_dump_json()
    run = Run.model_validate_json(tell(told))
    shared = {name: getattr(run, name) for name in ("target_path", *_ALIKE)}
    job = Job(settings=settings, draft_path=str(draft), **shared)
    return job, AttachedServers(job, watches).check()


def _first_that_answers(watches: Sequence[Watch]) -> Watch:
    for watch in watches:
        watch.look()
    found = next((watch for watch in watches if watch.run), None)
    if found is None:
        raise Unanswered(watches[0].silence)
    return found
