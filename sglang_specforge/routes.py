"""``/draft/*`` in the server's own FastAPI app, behind its authentication like every route of it.

Errors say what is wrong and change nothing: 400 for a body that is not understood, 404 for a version or an A/B that
there is not, 409 where somebody else decides which draft is active, or reads the streams, 422 for a checkpoint that
cannot be served, 503 where the schedulers do not answer for draft training.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, HTTPException, Query, Request, UploadFile
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from sglang_specforge.ab.comparison import Turn
from sglang_specforge.ab.experiment import UnknownExperiment
from sglang_specforge.ab.part import NoPart
from sglang_specforge.ab.plan import Plan
from sglang_specforge.ab.report import Report
from sglang_specforge.ab.windows import NotCounted
from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.control import ControlService
from sglang_specforge.drafting import DraftingFixed
from sglang_specforge.manifest import Drafting, Mode
from sglang_specforge.reader import LEASE_S, Reader, ReaderHeld
from sglang_specforge.settings import Run
from sglang_specforge.swaps import Change, DraftHeld, NotAttached, SwapRefused, UnknownVersion

_STATUS = {
    UnknownVersion: 404,
    UnknownExperiment: 404,
    NoPart: 404,
    DraftHeld: 409,
    ReaderHeld: 409,
    CheckpointError: 422,
    SwapRefused: 422,
    DraftingFixed: 422,
    NotAttached: 503,
    NotCounted: 503,
}
Version = Annotated[StrictInt, Field(ge=0, lt=2**53, description="Number of a draft version.")]
Why = Annotated[str, Field(max_length=1000, description="For the audit log.")]
Leader = Annotated[str, PathParameter(pattern="^[0-9a-f]{8,64}$", description="Whoever leads an A/B of servers.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewVersion(_Body):
    """Body of ``POST /draft/versions``."""

    path: Path = Field(description="Folder of the checkpoint, as the server sees it.")
    activate: StrictBool = Field(True, description="Put it into service; otherwise it is only made resident.")
    why: Why = ""


_MULTIPART = "multipart/form-data"
_AN_UPLOAD = {
    "type": "object",
    "properties": {
        "config": {"type": "string", "format": "binary", "description": "The checkpoint's config.json."},
        "weights": {"type": "string", "format": "binary", "description": "Its model.safetensors."},
        "activate": {"type": "boolean", "default": True},
        "why": {"type": "string", "maxLength": 1000},
    },
    "required": ["config", "weights"],
}


class _OfForms(APIRoute):
    """For requests whose body is a form; the route after it, of the same path, has the others."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_form = Headers(scope=scope).get("content-type", "").startswith(_MULTIPART)
        return super().matches(scope) if is_form else (Match.NONE, {})


class Activation(_Body):
    """Body of ``POST /draft/activate``."""

    version: Version
    why: Why = ""


class Rollback(_Body):
    """Body of ``POST /draft/rollback``."""

    to: Version | None = Field(None, description="Left out: what was active before.")
    why: Why = ""


class GateMode(_Body):
    """Body of ``POST /draft/gate``."""

    mode: Mode
    why: Why = ""


class DraftingMode(_Body):
    """Body of ``POST /draft/drafting``."""

    mode: Drafting
    why: Why = ""


class Arms(_Body):
    """Body of ``POST /draft/ab/led/{leader}``."""

    versions: Annotated[list[Version], Field(min_length=1, max_length=8)]


class Window(_Body):
    """Body of ``POST /draft/ab/led/{leader}/window``."""

    version: Version


class Capture(_Body):
    """Body of ``POST /draft/capture``."""

    enabled: StrictBool


class Activated(BaseModel):
    """What a change of the active version did."""

    before: int
    version: int
    changed: bool

    @classmethod
    def by(cls, change: Change) -> "Activated":
        return cls(**change._asdict(), changed=change.before != change.version)


def make_router(service: ControlService, run: Run) -> APIRouter:
    router = APIRouter(prefix="/draft", tags=["draft training"])
    swaps, experiments = service.swaps, service.experiments

    @router.get("/status")
    async def status() -> dict[str, Any]:
        """Versions, tokens by fate, acceptance length overall and by version, and the trainer's state."""
        with _answered():
            return await service.status()

    @router.get("/run")
    async def show_run() -> Run:
        """Target, draft, settings and endpoints: what ``python -m trainer attach`` asks for."""
        return run

    @router.post("/capture")
    async def switch_capture(capture: Capture) -> dict[str, bool]:
        """Pause or resume capturing on every exporter; serving and the draft stay as they are."""
        await service.switch_capture(capture.enabled)
        return {"enabled": capture.enabled}

    @router.post("/reader")
    async def lease(reader: Reader) -> dict[str, float]:
        """Have the streams of this server sent to a trainer on another machine, which asks again before the lease runs
        out. What is sent is encrypted, and only who holds the key's secret can read it."""
        with _answered():
            await service.lease(reader)
        return {"seconds": LEASE_S}

    @router.delete("/reader")
    async def end_lease(key: Annotated[str, Query(max_length=40)]) -> dict[str, bool]:
        """Of the reader with this key, if it has one."""
        await service.end_lease(key)
        return {"leased": False}

    @router.get("/versions")
    async def versions() -> list[dict[str, Any]]:
        """Every draft version there is: where, its content's hash, whether resident or active, and its acceptance."""
        with _answered():
            return await service.versions()

    async def add_upload(
        config: UploadFile,
        weights: UploadFile,
        request: Request,
        activate: Annotated[bool, Form()] = True,
        why: Annotated[Why, Form()] = "",
    ) -> dict[str, Any]:
        return await add_version(NewVersion(**await upload(config, weights), activate=activate, why=why), request)

    router.add_api_route(
        "/versions", add_upload, methods=["POST"], route_class_override=_OfForms, include_in_schema=False
    )

    @router.post("/versions", openapi_extra={"requestBody": {"content": {_MULTIPART: {"schema": _AN_UPLOAD}}}})
    async def add_version(body: NewVersion, request: Request) -> dict[str, Any]:
        """Make a checkpoint a version, load it on every rank, and activate it: one from the server's disk, by its path,
        or one whose two files are uploaded. A checkpoint that is a version already keeps its number; one of another
        trainer's is taken in as at start."""
        with _answered():
            version = await swaps.add(body.path, _who(request))
            if body.activate:
                return Activated.by(await swaps.activate(version, _who(request), body.why)).model_dump()
            await swaps.load(version)
            return {"version": version}

    @router.get("/versions/{version}/{file}", response_class=FileResponse)
    async def version_file(
        version: Annotated[int, PathParameter(ge=0, lt=2**53)], file: Literal["config.json", "model.safetensors"]
    ) -> FileResponse:
        """A version's checkpoint, to be had on another machine."""
        with _answered():
            return FileResponse(swaps.path(swaps.known(version)) / file)

    @router.post("/uploads")
    async def upload(config: UploadFile, weights: UploadFile) -> dict[str, str]:
        """A checkpoint's ``config.json`` and ``model.safetensors`` from another machine, to be asked for later: by the
        ``path`` that is answered. Of those never asked for, only the newest are kept."""
        with _answered():
            return {"path": str(await asyncio.to_thread(swaps.uploads.save, config.file, weights.file))}

    @router.post("/activate")
    async def activate(body: Activation, request: Request) -> Activated:
        """Put a version into service, on all ranks or on none."""
        with _answered():
            return Activated.by(await swaps.activate(body.version, _who(request), body.why))

    @router.post("/rollback")
    async def roll_back(body: Rollback, request: Request) -> Activated:
        """Go back to what was active before. What the trainer publishes then waits, until the gate is opened again."""
        with _answered():
            return Activated.by(await swaps.roll_back(_who(request), body.why, body.to))

    @router.post("/gate")
    async def set_gate(body: GateMode, request: Request) -> dict[str, str]:
        """What becomes of versions that the trainer publishes: auto, propose or off."""
        swaps.set_gate(body.mode, _who(request), body.why)
        return {"mode": swaps.gate}

    @router.post("/drafting")
    async def set_drafting(body: DraftingMode, request: Request) -> dict[str, str]:
        """Whether steps draft: always, never, or (auto) while it makes answers faster; also after a restart."""
        with _answered():
            service.drafting.set_mode(body.mode, _who(request), body.why)
        return {"mode": service.drafting.mode}

    @router.get("/events")
    async def events(last: Annotated[int, Query(ge=1, le=10_000)] = 100) -> list[dict[str, Any]]:
        """The newest events of the audit log, oldest first."""
        return swaps.audit.last(last)

    @router.get("/ab")
    async def all_experiments() -> list[Report]:
        """Every A/B of this run folder, oldest first."""
        return experiments.all()

    @router.post("/ab")
    async def start_experiment(plan: Plan, request: Request) -> Report:
        """Compare versions on live traffic, by turns in random order, until it is settled."""
        with _answered():
            return await experiments.start(plan, _who(request))

    @router.get("/ab/{id}")
    async def show_experiment(id: str) -> Report:
        with _answered():
            return experiments.get(id)

    @router.delete("/ab/{id}")
    async def stop_experiment(id: str, request: Request) -> Report:
        """End it: what was active before is active again. One that has ended stays as it is."""
        with _answered():
            return await experiments.stop(id, _who(request))

    @router.post("/ab/led/{leader}")
    async def join(leader: Leader, body: Arms, request: Request) -> dict[str, float]:
        """Take part in an A/B of several servers: its leader alone decides which of these versions is shown, until it
        ends that, or says nothing for the answered number of seconds."""
        with _answered():
            return {"seconds": await service.part.join(leader, body.versions, _who(request))}

    @router.post("/ab/led/{leader}/window")
    async def open_window(leader: Leader, body: Window) -> dict[str, int]:
        """Begin a window with this version."""
        with _answered():
            await service.part.show(leader, body.version)
        return {"version": body.version}

    @router.get("/ab/led/{leader}")
    async def look_into_window(leader: Leader) -> Turn:
        """What the present window has seen so far."""
        with _answered():
            return await service.part.look(leader)

    @router.delete("/ab/led/{leader}")
    async def leave(
        leader: Leader,
        request: Request,
        promote: Annotated[int | None, Query(ge=0, lt=2**53, description="Version to activate.")] = None,
        why: Why = "",
    ) -> dict[str, int]:
        """End the server's part: what was active before is active again, or what is promoted."""
        with _answered():
            await service.part.end(leader, _who(request), why, promote)
        return {"active": swaps.active}

    return router


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """What goes wrong becomes an answer."""
    try:
        yield
    except tuple(_STATUS) as error:
        status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        raise HTTPException(status, str(error)) from error


def _who(request: Request) -> str:
    return f"operator at {request.client.host}" if request.client else "operator"
