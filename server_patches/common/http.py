"""The HTTP process: the control service and its routes, for as long as SGLang's server runs."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_specforge.control import ControlService, running
from sglang_specforge.routes import make_router
from sglang_specforge.settings import Run


def launch_with_draft_training(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``http_server.launch_server``: SGLang's app gets our routes and our service for its lifespan. Only the
    first node of several serves it."""
    app: FastAPI = http_server.app
    run = Run.inherited()
    if run.node:
        return original(server_args, *args, **kwargs)
    service = ControlService(run, _SGLangEngine())
    # Not included as a router: SGLang looks for a route's level among the app's own.
    app.router.routes.extend(_guarded(make_router(service, run)).routes)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state, running(service):
            yield state

    app.router.lifespan_context = lifespan
    app.state.draft_training = service
    return original(server_args, *args, **kwargs)


def _guarded(router: APIRouter) -> APIRouter:
    """Our routes, for whoever has the key to SGLang's own control endpoints: the admin's, where there is one."""
    for route in router.routes:
        auth_level(AuthLevel.ADMIN_OPTIONAL)(route.endpoint)
    return router


def serve_our_series(result: None, app: FastAPI) -> None:
    """AFTER ``http_server.add_prometheus_middleware``: what it serves at ``/metrics``, and ours; only where the
    app has our service, as that of the first of several nodes."""
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

    if not hasattr(app.state, "draft_training"):
        return
    registry = CollectorRegistry()  # SGLang's own is out of reach
    multiprocess.MultiProcessCollector(registry)
    registry.register(app.state.draft_training.metrics)
    app.routes[-1].app = make_asgi_app(registry=registry)


def let_the_trainer_save(*args: Any, **kwargs: Any) -> None:
    """BEFORE ``kill_process_tree``, wherever SGLang calls it. The tokenizer manager does for a server that was told to
    end (SIGTERM) and has answered every request: it kills its children, the trainer among them. One that breaks down
    does not wait, and one that never came up has nothing to save."""
    state = http_server._global_state
    if state is not None and state.tokenizer_manager.gracefully_exit:
        http_server.app.state.draft_training.end()


class _SGLangEngine:
    """``swaps.Engine`` on SGLang's tokenizer manager, which broadcasts to every scheduler."""

    async def set_state(self, **values: int) -> bool:
        return all(await self._manager.set_internal_state(SetInternalStateReq(server_args=values)))

    async def get_states(self) -> list[dict[str, Any]]:
        return await self._manager.get_internal_state()

    @property
    def _manager(self) -> Any:
        return http_server._global_state.tokenizer_manager
