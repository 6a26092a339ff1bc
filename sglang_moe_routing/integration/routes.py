"""Our HTTP routes on SGLang's app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.auth import AuthLevel, auth_level

from .. import runtime
from ..config import bearer_key, choose_group
from ..errors import RoutingError, RoutingRequestError
from ..runtime import metrics
from . import reloading
from .http_server import scheduler_states, tokenizer_manager
from .reloading import ERROR
from .selecting import PolicyHeaderMiddleware

logger = logging.getLogger(__name__)

RELOAD = "/moe_routing/reload"


def refuse_strangers(request: Request) -> None:
    """Who gets no answer from a model gets none about it: a listed API key, or the admin's."""
    config, authorization = runtime.current().config, request.headers.get("authorization")
    admin = get_serving().admin_api_key
    if admin and secrets.compare_digest(bearer_key(authorization).encode(), admin.encode()):
        return
    try:
        choose_group(config, config.default, authorization)
    except RoutingRequestError as error:  # not counted: nobody asked for tokens
        raise HTTPException(status_code=error.status, detail=str(error)) from None


async def list_policies() -> dict[str, Any]:
    """The policies that are loaded, and which of them clients may pick."""
    state = runtime.current()
    config = state.config
    return {
        "object": "list",
        "default": config.default,
        "header": config.header[0],
        "headers": config.header,
        "config_sha256": state.loaded.sha256,
        "data": [
            {
                "id": name,
                "object": "moe_routing.policy",
                "choosable": name in config.choosable,
                "definition": policy.model_dump(mode="json", exclude_defaults=True)
                | {"kind": policy.kind},
            }
            for name, policy in zip(config.names, config.definitions, strict=True)
        ],
    }


async def read_statistics() -> dict[str, Any]:
    """Active experts counted since the start, summed over decode steps, per MoE layer."""
    states = await scheduler_states(tokenizer_manager())
    for state in states:
        del state[ERROR]
    return {"object": "list", "data": states}


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]  # sglang is untyped
async def reload_config() -> dict[str, Any]:
    """Read the routing config anew and put it into force, or change nothing and say why."""
    config = runtime.current().config
    if config.reload.http != "open" and not get_serving().admin_api_key:
        raise HTTPException(
            status_code=403,
            detail="reloading over HTTP needs --admin-api-key, or reload.http: open in the routing "
            "config; SIGHUP to the server's main process reloads too",
        )
    try:
        loaded = await reloading.reload(tokenizer_manager())
    except RoutingError as error:
        raise HTTPException(status_code=400, detail=str(error)) from None
    return {
        "object": "moe_routing.reload",
        "config_sha256": loaded.sha256,
        "policies": list(loaded.config.names),
    }


def reload_on_hangup() -> bool:
    """SIGHUP to this process reloads, from now on; False where a thread serves, as it gets none.

    Called in the server's event loop.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    loop = asyncio.get_running_loop()

    async def reload_and_log() -> None:
        with contextlib.suppress(RoutingError):  # already logged
            await reloading.reload(tokenizer_manager())

    loop.add_signal_handler(signal.SIGHUP, lambda: _keep(loop.create_task(reload_and_log())))
    return True


_tasks: set[asyncio.Task[None]] = set()


def _keep(task: asyncio.Task[None]) -> None:
    """The loop itself holds tasks weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


class StartMiddleware:
    """Pure ASGI middleware: what is to be done once the server's event loop runs."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            state = runtime.current()
            metrics.show_config(state.loaded.sha256, state.config.choosable)
            remedy = f"kill -HUP {os.getpid()}" if reload_on_hangup() else f"POST {RELOAD}"
            logger.info(
                "MoE routing policies in force: %s; default: %s; reload %s with: %s",
                ", ".join(state.config.names),
                state.config.default,
                state.loaded.path,
                remedy,
            )
        await self._app(scope, receive, send)


def add_routes(app: FastAPI) -> None:
    """Add routes and the response header, once, before the app starts."""
    if RELOAD in [getattr(route, "path", None) for route in app.routes]:
        return
    listed = [Depends(refuse_strangers)]
    for path, method, endpoint, dependencies in (
        ("/v1/moe_routing/policies", "GET", list_policies, listed),
        ("/v1/moe_routing/statistics", "GET", read_statistics, listed),
        (RELOAD, "POST", reload_config, []),
    ):  # not through an APIRouter: SGLang finds the auth level of the app's own routes only
        app.add_api_route(
            path, endpoint, methods=[method], dependencies=dependencies, tags=["moe routing"]
        )
    app.add_middleware(StartMiddleware)
    app.add_middleware(PolicyHeaderMiddleware)
