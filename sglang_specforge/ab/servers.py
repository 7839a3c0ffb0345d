"""A/B of several servers, led from here: in each window they serve different arms at the same time."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from sglang_specforge.ab.comparison import Turn, judge
from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.report import Arm, Report
from sglang_specforge.ab.turns import compare
from sglang_specforge.client import COPY_LIMIT_S, Unanswered, accepted, opened, run_of

_LIMIT_S = 180  # of a version's way onto every rank


class Servers:
    """A ``turns.Stage`` whose places are servers of one target. Versions are numbered as the first one does."""

    def __init__(self, urls: Sequence[str], api_key: str | None) -> None:
        self.urls, self._api_key = [url.rstrip("/") for url in urls], api_key
        self.leader = secrets.token_hex(8)
        self._numbers: dict[str, dict[int, int]] = {url: {} for url in self.urls}  # of each, by the first one's
        self._joined: list[str] = []

    def find(self, given: str) -> Arm:
        """An arm, on every server: the active version, a version's number at the first, or a checkpoint's folder, which
        is copied to each.

        Raises:
            Unanswered: a server does not answer, or has no such version.
            OSError: the folder cannot be read.
        """
        first = self._version(self.urls[0], given)
        if given.isdecimal():  # versions are numbered by each server
            others = [self._choose(url, given, "sha256", first["sha256"]) for url in self.urls[1:]]
        else:
            others = [self._version(url, given) for url in self.urls[1:]]
        for other, url in zip(others, self.urls[1:], strict=True):
            if first["sha256"] is None or other["sha256"] != first["sha256"]:
                raise Unanswered(
                    f"{given} is version {first['version']} at {self.urls[0]} and version {other['version']} at {url}, "
                    "and these are not known to be the same draft; give a checkpoint's folder"
                )
        for url, found in zip(self.urls, (first, *others), strict=True):
            self._numbers[url][first["version"]] = found["version"]
        return Arm(version=first["version"], path=first["path"])

    def check_targets(self) -> None:
        """Raises Unanswered: they do not all serve the same one."""
        if len(set(self.urls)) < len(self.urls):
            raise Unanswered("a server was named twice")
        served = {url: run_of(url, self._api_key).target_fingerprint for url in self.urls}
        for url, fingerprint in served.items():
            if fingerprint != served[self.urls[0]]:
                raise Unanswered(f"the server at {url} serves another target than the one at {self.urls[0]}")

    def active(self) -> int:
        """The version in service at the first one; the others may have another. Raises Unanswered."""
        return self._version(self.urls[0], "active")["version"]

    @contextlib.asynccontextmanager
    async def joined(self, report: Report) -> AsyncIterator[None]:
        """Around a comparison: every server takes part, and each leaves whatever happens, with what the report says is
        to be promoted. Raises Unanswered."""
        renewing = []
        try:
            for url in self.urls:
                versions = [self._numbers[url][arm.version] for arm in report.arms]
                limit_s = _LIMIT_S * len(versions)
                lease = (await self._say("POST", url, timeout=limit_s, json={"versions": versions})).json()
                self._joined.append(url)
                renewing.append(asyncio.create_task(self._renew(url, lease["seconds"])))
            yield
        finally:
            for task in renewing:
                task.cancel()
            await self._leave(report)

    async def places(self) -> list[str]:
        return self.urls

    async def open(self, versions: dict[str, int]) -> None:
        own = {url: self._numbers[url][version] for url, version in versions.items()}
        await asyncio.gather(*(self._say("POST", url, "/window", json={"version": own[url]}) for url in own))

    async def look(self) -> dict[str, Turn]:
        answers = await asyncio.gather(*(self._say("GET", url) for url in self.urls))
        return {url: Turn.model_validate_json(a.content) for url, a in zip(self.urls, answers, strict=True)}

    async def _renew(self, url: str, lease_s: float) -> None:
        """A window, or the others' way into the comparison, may be longer than a lease. Who does not answer is found by
        the next look at it."""
        while True:
            await asyncio.sleep(lease_s / 3)
            with contextlib.suppress(Unanswered):
                await self._say("GET", url)

    async def _leave(self, report: Report) -> None:
        """Every server that can be reached; raises Unanswered for the others, in the end."""
        asked: dict[str, Any] = {"why": (report.why or "its leader ended it")[:1000]}
        answers = []
        for url in self._joined:
            more = {} if report.to_promote is None else {"promote": self._numbers[url][report.to_promote]}
            answers.append(self._say("DELETE", url, params={**asked, **more}, timeout=_LIMIT_S))
        self._joined = []
        missing = [e for e in await asyncio.gather(*answers, return_exceptions=True) if isinstance(e, BaseException)]
        if missing:
            raise missing[0]

    async def _say(self, method: str, url: str, path: str = "", timeout: float = 30, **more: Any) -> httpx.Response:
        path = f"/draft/ab/led/{self.leader}{path}"
        return await asyncio.to_thread(accepted, method, url, path, self._api_key, timeout=timeout, **more)

    def _version(self, url: str, given: str) -> dict[str, Any]:
        """Of this server, as ``GET /draft/versions`` has it."""
        if given == "active":
            return self._choose(url, given, "active", True)
        number = int(given) if given.isdecimal() else self._add(url, Path(given))
        return self._choose(url, given, "version", number)

    def _choose(self, url: str, given: str, fact: str, value: Any) -> dict[str, Any]:
        for version in accepted("GET", url, "/draft/versions", self._api_key, timeout=30).json():
            if version[fact] == value:
                return version
        raise Unanswered(f"{url} has no such version as {given}; give a checkpoint's folder")

    def _add(self, url: str, checkpoint: Path) -> int:
        with opened(checkpoint) as files:
            body = {"files": files, "data": {"activate": "false"}}
            answer = accepted("POST", url, "/draft/versions", self._api_key, timeout=COPY_LIMIT_S, **body)
        return answer.json()["version"]


async def compare_servers(
    servers: Servers, given: Sequence[str], settings: dict[str, Any], changed: Callable[[Report], None]
) -> Report:
    """An A/B from its beginning to its end; ``settings`` are the plan's. Whatever happens, the servers are let go.

    Raises:
        Unanswered, OSError: it cannot begin.
        pydantic.ValidationError: of the plan.
    """
    servers.check_targets()
    Plan(arms=["active"] * len(given), **settings)  # before anything is copied
    arms = [servers.find(arm) for arm in given]
    plan = Plan(arms=[arm.version for arm in arms], **settings)
    report = Report(
        id=servers.leader, who="operator", plan=plan, servers=servers.urls, incumbent=servers.active(), arms=arms,
        judgement=judge([], len(arms), plan), began=datetime.now(UTC),
    )  # fmt: skip
    state = "ended"
    try:
        async with servers.joined(report):
            await compare(report, servers, changed)
        report.promoted = report.to_promote is not None
    except asyncio.CancelledError:
        state, report.why = "stopped", "stopped"
    except Unanswered as error:
        state, report.why = "failed", str(error)
    report.state, report.ended = state, datetime.now(UTC)
    return report
