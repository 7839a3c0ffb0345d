"""Servers that this trainer was pointed at: found over HTTP, and looked for again when they are gone."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from pydantic import BeforeValidator, Field, model_validator

from sglang_specforge.checkpoint import noted_content
from sglang_specforge.client import Unanswered, request, run_of
from sglang_specforge.curve import Endpoint
from sglang_specforge.engine_address import EngineAddress
from sglang_specforge.foreign_draft import import_draft
from sglang_specforge.pull import Puller
from sglang_specforge.settings import OnlineSettings, Run
from sglang_specforge.sockets import EndpointTaken
from sglang_specforge.target import fingerprint_target, resolve_target
from sglang_specforge.training_settings import Job
from sglang_specforge.versions import VersionFolder
from trainer.far import Far, Stream
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
    listen: Endpoint | None = Field(
        None,
        description="tcp://HOST:PORT, for servers on other machines; HOST is this one's IPv4 address. The first server "
        "has PORT and PORT+1, the next the two ports after that. Encrypted.",
    )
    pull: EngineAddress | None = Field(
        None,
        description="With listen: pull states from servers that have --draft-training-pull, as rdma://HOST/DEVICE (or "
        "tcp://HOST), HOST this machine's address. Not encrypted.",
    )
    target: str | None = Field(
        None, description="Local folder or hub name of the target, where it is not where the first server has it."
    )

    def address(self, index: int) -> tuple[str, int]:
        """Host, and the first of two ports, for the server of this place in ``servers``. Needs ``listen``."""
        host, _, port = self.listen.removeprefix("tcp://").rpartition(":")
        return host, int(port) + 2 * index

    @model_validator(mode="after")
    def _check_ports(self) -> "AttachSettings":
        if self.pull and not self.listen:
            raise ValueError(f"pull = {self.pull} is for servers on other machines; give listen as well")
        if self.listen and self.address(len(self.servers))[1] > 65536:
            raise ValueError(f"{self.listen} leaves no two ports for each of {len(self.servers)} servers")
        return self


class CannotAttach(RuntimeError):
    """A server cannot be trained on, or not beside the others; the message says why."""


class Watch:
    """What one address says of itself. ``make_far``, given its key, is how it is reached from another machine."""

    def __init__(self, url: str, api_key: str | None, make_far: Callable[[str], Far] | None = None) -> None:
        self.url, self._api_key, self._make_far = url, api_key, make_far
        self.run: Run | None = None  # the newest that it told of
        self.far: Far | None = None  # of that life, where it is on another machine
        self.leased_to: str | None = None  # where it sends its states, if to another machine
        self.silence = ""  # why it does not answer now
        self.moved: dict[str, float] = {}  # as ``online.Servers`` has it
        self.serves: Path | None = None  # checkpoint of its draft, where that is on this machine

    def start(self) -> None:
        threading.Thread(target=self._keep_looking, name=f"specforge-watch-{self.url}", daemon=True).start()

    def look(self) -> None:
        try:
            silence = ""
            run, status = run_of(self.url, self._api_key), self._status()
            self._follow(run, status["reader"])
            moved = status["draft"]["drift"]["moved"]
            self.moved = {name: time.time() - move["since_s"] for name, move in moved.items()}
            if self.far and self.far.is_leased:
                self.far.keep()
            if status["draft"]["held_by"] is None:  # what an A/B shows goes again
                active = status["draft"]["active_version"]
                self.serves = self.far.checkpoint(active) if self.far else run.version_path(active)
        except (Unanswered, EndpointTaken) as error:
            silence = str(error)
        if silence and not self.silence:
            logger.warning("draft training: %s; it is asked again until it does", silence)
        elif self.silence and not silence:
            logger.info("draft training: the server at %s answers", self.url)
        self.silence = silence

    def fetch_draft(self, folder: Path) -> Path:
        """The checkpoint in service; copied to ``folder`` where it is on another machine. Raises Unanswered."""
        version = self._status()["draft"]["active_version"]
        return self.far.fetch(version, folder) if self.far else self.run.version_path(version)

    def stream(self) -> Stream:
        return Stream(self.run, self.far)

    def _follow(self, run: Run, reader: dict[str, Any]) -> None:
        is_new = self.run is None or run.spans_endpoint != self.run.spans_endpoint
        if is_new:
            self.far = self._make_far(reader["key"]) if self._make_far and not is_here(run) else None
        self.leased_to = (reader["lease"] or {}).get("spans_endpoint")
        self.run = run

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

    def start(self) -> "AttachedServers":
        for watch in self._watches:
            watch.start()
        return self

    def check(self) -> None:
        """Raises CannotAttach where a server that answers cannot be trained on."""
        for watch in self._watches:
            if watch.run and (problem := self._problem(watch)):
                raise CannotAttach(f"the server at {watch.url} {problem}")

    def streams(self) -> list[Stream]:
        streams = []
        for watch in self._watches:
            if (run := watch.run) is None:
                continue
            problem = None if watch.silence else self._problem(watch)  # one that is silent is as it was
            if problem is None:
                streams.append(watch.stream())
            elif run.spans_endpoint not in self._refused:
                self._refused.add(run.spans_endpoint)
                logger.error("draft training: a server is left out: the one at %s %s", watch.url, problem)
        return streams

    def are_gone(self) -> bool:
        """Servers may come back at any time, but a process without its launcher has to end."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent_pid

    def served(self) -> Path | None:
        found = [w.serves for w in self._watches if w.run and not w.silence and self._problem(w) is None]
        contents = {serves and noted_content(serves) for serves in found}
        return found[0] if len(contents) == 1 and None not in contents else None

    def moved(self) -> dict[str, float]:
        """Where several servers say it of a slice, since the latest."""
        moves = [move for watch in self._watches for move in watch.moved.items()]
        return dict(sorted(moves, key=lambda move: move[1]))

    def _problem(self, watch: Watch) -> str | None:
        run = watch.run
        for name in _ALIKE:
            if (found := getattr(run, name)) != (expected := getattr(self._job, name)):
                return f"has {name} {found}, and this training's is {expected}; give it a trainer of its own"
        if watch.far is None and run.run_dir == self._job.run_dir:
            return f"keeps its own versions in {run.run_dir}; give another --run-dir"
        if watch.far is None and run.is_spread:
            return (
                f"computes requests on {run.nodes} nodes; give --listen tcp://HOST:PORT with an address of this "
                "machine that all of them reach"
            )
        if watch.far is None and not is_here(run):
            return (
                f"streams to {run.spans_endpoint}, which is not there for this process: it runs on another machine or "
                "in another container; start the trainer beside it, as the same user, or give --listen tcp://HOST:PORT "
                "with an address of this machine that the server reaches"
            )
        if watch.far is None and watch.leased_to:
            return f"sends its states to {watch.leased_to}; end the trainer there first"
        return None


def attach(settings: AttachSettings, api_key: str | None) -> tuple[Job, AttachedServers]:
    """Find the servers, and begin with the draft that the first of them serves. All processes call together.

    Raises:
        Unanswered: none of them answers.
        CannotAttach: one that answers cannot be trained on with this job.
        SegmentRefused: there is no transfer engine to pull with.
    """
    watches = _watches(settings, api_key) if dist.get_rank() == 0 else []
    versions = VersionFolder(settings.run_dir.absolute())
    told = None
    if watches:
        first = _first_that_answers(watches)
        target = _target_of(first.run, settings)
        job = Job(
            settings=settings,
            target_path=str(target),
            draft_path=str(versions.root / "initial"),
            **{name: getattr(first.run, name) for name in _ALIKE},
        )
        AttachedServers(job, watches).check()
        if not (Path(job.draft_path) / "config.json").exists():
            import_draft(first.fetch_draft(versions.root / "fetched"), target, Path(job.draft_path))
        told = job.model_dump_json(exclude={"settings"})
    job = Job(settings=settings, **json.loads(tell(told)))
    return job, AttachedServers(job, watches).start()


def is_here(run: Run) -> bool:
    """All of the server's states come to sockets that this process can reach."""
    return not run.is_spread and run.socket_folder.is_dir()


def _watches(settings: AttachSettings, api_key: str | None) -> list[Watch]:
    versions = VersionFolder(settings.run_dir.absolute())

    puller = Puller(settings.pull) if settings.pull else None

    def make_far(index: int, url: str, peer: str) -> Far:
        return Far(url, api_key, *settings.address(index), peer, versions, puller)

    return [
        Watch(url, api_key, partial(make_far, index, url) if settings.listen else None)
        for index, url in enumerate(settings.servers)
    ]


def _target_of(run: Run, settings: AttachSettings) -> Path:
    """Where the target is on this machine. Raises CannotAttach, TargetError."""
    target = resolve_target(settings.target) if settings.target else Path(run.target_path)
    if not target.is_dir():
        raise CannotAttach(f"the target is not at {target} on this machine; say where it is with --target")
    if settings.target and (found := fingerprint_target(target)) != run.target_fingerprint:
        raise CannotAttach(
            f"the target at {target} has the fingerprint {found}, the served one {run.target_fingerprint}"
        )
    return target


def _first_that_answers(watches: Sequence[Watch]) -> Watch:
    for watch in watches:
        watch.look()
    found = next((watch for watch in watches if watch.run), None)
    if found is None:
        raise Unanswered(watches[0].silence)
    return found
