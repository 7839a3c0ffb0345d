"""A server on another machine: its streams come through TCP, and what it shall serve is brought there over HTTP."""

import logging
import queue
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import zmq

from sglang_specforge.checkpoint import noted_content
from sglang_specforge.client import COPY_LIMIT_S, Unanswered, connection, refusal, request, upload_checkpoint
from sglang_specforge.contracts.control import VersionReady
from sglang_specforge.curve import Door, Identity
from sglang_specforge.pull import Puller
from sglang_specforge.reader import Reader
from sglang_specforge.settings import Run
from sglang_specforge.sockets import EndpointTaken
from sglang_specforge.versions import VersionFolder

logger = logging.getLogger(__name__)

_LEASE_TIMEOUT_S = 10


class Far:
    """One life of such a server, and how it is reached.

    Args:
        port: the first of two that are listened at, for states and for what the trainer tells.
        peer: the server's public key.
        versions: the trainer's own.
        puller: pulls states out of its memory, where it offers that.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        host: str,
        port: int,
        peer: str,
        versions: VersionFolder,
        puller: Puller | None = None,
    ) -> None:
        self.puller = puller
        self.spans_endpoint, self.control_endpoint = f"tcp://{host}:{port}", f"tcp://{host}:{port + 1}"
        self.is_leased = False
        self.paths: dict[int, Path] = {}  # of the server's versions, those that are here as well
        self._url, self._api_key, self._own, self._peer = url, api_key, Identity.new(), peer
        self._versions = versions
        self._copies = versions.root / f"copied-{port}"  # of drafts that came to the server from elsewhere
        self._copying: threading.Thread | None = None
        self._to_bring: queue.SimpleQueue[VersionReady | None] = queue.SimpleQueue()
        self._brought: queue.SimpleQueue[VersionReady] = queue.SimpleQueue()

    def open_door(self) -> Door:
        return Door(self._own, self._peer)

    def lease(self) -> None:
        """Have the server send its states here.

        Raises:
            EndpointTaken: it sends them elsewhere.
            Unanswered: it does not answer.
        """
        self._ask_for_lease()
        self.is_leased = True
        threading.Thread(target=self._bring, name=f"specforge-courier-{self._url}", daemon=True).start()

    def keep(self) -> None:
        """Now and then: renew the lease, and see which of the server's versions are here as well. Raises as ``lease``
        does."""
        self._ask_for_lease()
        own = [self._versions.root / "initial", *map(self._versions.path, self._versions.published())]
        folders = [*own, *self._copies.glob("*")]
        here = {content: folder for folder in folders if (content := noted_content(folder))}
        told = self._ask("GET", "/draft/versions", timeout=_LEASE_TIMEOUT_S).json()
        self.paths = {one["version"]: here[one["sha256"]] for one in told if one["sha256"] in here}

    def release(self) -> None:
        """The server need not wait until the lease runs out."""
        self.is_leased = False
        self._to_bring.put(None)
        try:
            self._ask("DELETE", "/draft/reader", params={"key": self._own.public}, timeout=_LEASE_TIMEOUT_S)
        except Unanswered as error:
            logger.info("draft training: the lease runs out by itself: %s", error)

    def checkpoint(self, version: int) -> Path | None:
        """Where the server's version is on this machine; one that is not is copied, in a thread: the way may be longer
        than a lease."""
        here = self.paths.get(version)
        if here is None and not (self._copying and self._copying.is_alive()):
            self._copying = threading.Thread(
                target=self._copy, args=(version,), name=f"specforge-copy-{self._url}", daemon=True
            )
            self._copying.start()
        return here

    def _copy(self, version: int) -> None:
        copies = sorted(self._copies.glob("*"), key=lambda copy: copy.stat().st_mtime)
        for old in copies[:-1]:  # the latest may be compared with just now
            shutil.rmtree(old, ignore_errors=True)
        try:
            copied = self.fetch(version, self._copies / str(version))
            self.paths = {**self.paths, version: copied}
        except (Unanswered, OSError) as error:
            logger.warning("draft training: the draft in service cannot be compared with yet: %s", error)

    def fetch(self, version: int, folder: Path) -> Path:
        """Copy one of the server's checkpoints to ``folder``. Raises Unanswered."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            url = f"{self._url}/draft/versions/{version}/{name}"
            told = {"timeout": COPY_LIMIT_S, **connection(self._api_key)}
            try:
                with httpx.stream("GET", url, **told) as answer, (folder / name).open("wb") as file:
                    answer.raise_for_status()
                    for piece in answer.iter_bytes():
                        file.write(piece)
            except httpx.HTTPError as error:
                raise Unanswered(f"{url} cannot be fetched: {error}") from error
        return folder

    def bring(self, message: VersionReady) -> None:
        """Have a version taken to the server, in a thread: it may be large, and the way long."""
        self._to_bring.put(message)

    def brought(self) -> list[VersionReady]:
        """Versions that are there by now, each by its path on the server."""
        return [self._brought.get() for _ in range(self._brought.qsize())]

    def _bring(self) -> None:
        while (message := self._to_bring.get()) is not None:
            # What came meanwhile replaces it, unless only this one has passed.
            while not self._to_bring.empty() and (newer := self._to_bring.get()) is not None:
                message = _worthier(message, newer)
            if not self.is_leased:
                return
            try:
                path = upload_checkpoint(self._url, self._api_key, Path(message.path))
                self._brought.put(VersionReady(path=path, verdict=message.verdict))
            except (Unanswered, OSError) as error:
                logger.error("draft training: %s does not get to the server: %s", message.path, error)

    def _ask_for_lease(self) -> None:
        reader = Reader(
            spans_endpoint=self.spans_endpoint, control_endpoint=self.control_endpoint, key=self._own.public
        )
        answer = self._ask("POST", "/draft/reader", json=reader.model_dump(), timeout=_LEASE_TIMEOUT_S)
        if (why := refusal(answer)) is not None:
            raise EndpointTaken(f"the server at {self._url} sends its states elsewhere: {why}")

    def _ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return request(method, self._url, path, self._api_key, **kwargs)


class Stream(NamedTuple):
    """A server's, and how it is reached where the server is on another machine."""

    run: Run
    far: Far | None = None

    def version_path(self, version: int) -> Path | None:
        """Of a version of the server's, where this process can read it."""
        return self.far.paths.get(version) if self.far else self.run.version_path(version)

    def open_outbox(self, door: Door | None) -> zmq.Socket:
        """What goes to the server's control service. Raises EndpointTaken."""
        outbox = (door.context if door else zmq.Context.instance()).socket(zmq.PUSH)
        if door:
            door.bind(outbox, self.far.control_endpoint)
        else:
            outbox.connect(self.run.control_endpoint)
        return outbox


def _worthier(waiting: VersionReady, newer: VersionReady) -> VersionReady:
    passed, newer_passed = (m.verdict is None or m.verdict.passed for m in (waiting, newer))
    return waiting if passed and not newer_passed else newer
