"""The HTTP process: the control service and its routes, for as long as SGLang's server runs."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import SetInternalStateReq

from sglang_specforge.checkpoint import CheckpointError
from sglang_specforge.control import ControlService, NotAttached, SwapRefused, running
from sglang_specforge.settings import Run


def launch_with_draft_training(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``http_server.launch_server``: SGLang's app gets our routes and our service for its lifespan."""
    app: FastAPI = http_server.app
    run = Run.inherited()
    service = ControlService(run, _SGLangEngine())
    app.include_router(make_router(service, run))
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state, running(service):
            yield state

    app.router.lifespan_context = lifespan
    return original(server_args, *args, **kwargs)


def make_router(service: ControlService, run: Run) -> APIRouter:
    """``/draft/*``, behind SGLang's own authentication middleware like every route of its app."""
    router = APIRouter(prefix="/draft", tags=["draft training"])

    @router.get("/status")
    async def status() -> dict[str, Any]:
        """Versions, tokens by fate, acceptance length overall and by version, and the trainer's state."""
        try:
            return await service.status()
        except NotAttached as error:
            raise HTTPException(503, str(error)) from error

    @router.get("/run")
    async def show_run() -> Run:
        """Target, draft, settings and endpoints: what ``python -m trainer attach`` asks for."""
        return run

    @router.post("/versions")
    async def swap_in(checkpoint: NewVersion) -> dict[str, int]:
        """Activate a draft checkpoint from the server's disk; 422 says why it was refused."""
        try:
            return {"version": await service.swap_in(checkpoint.path)}
        except (CheckpointError, SwapRefused) as error:
            raise HTTPException(422, str(error)) from error

    @router.post("/capture")
    async def switch_capture(capture: Capture) -> dict[str, bool]:
        """Pause or resume capturing on every exporter; serving and the draft stay as they are."""
        await service.switch_capture(capture.enabled)
        return {"enabled": capture.enabled}

    return router


class NewVersion(BaseModel):
    """Body of ``POST /draft/versions``."""

    model_config = ConfigDict(extra="forbid")
    path: Path = Field(description="Folder of the checkpoint, as the server sees it.")


class Capture(BaseModel):
    """Body of ``POST /draft/capture``."""

    model_config = ConfigDict(extra="forbid")
    enabled: StrictBool


class _SGLangEngine:
    """``control.Engine`` on SGLang's tokenizer manager, which broadcasts to every scheduler."""

    async def set_state(self, key: str, value: int) -> bool:
        return all(await self._manager.set_internal_state(SetInternalStateReq(server_args={key: value})))

    async def get_states(self) -> list[dict[str, Any]]:
        return await self._manager.get_internal_state()

    @property
    def _manager(self) -> Any:
        return http_server._global_state.tokenizer_manager
