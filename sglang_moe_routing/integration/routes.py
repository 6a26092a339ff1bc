"""Our HTTP routes on SGLang's app."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request

from . import runtime
from .selecting import PolicyHeaderMiddleware
from .statistics import KEY

router = APIRouter(tags=["moe routing"])


@router.get("/v1/moe_routing/policies")
async def list_policies() -> dict[str, Any]:
    """The policies that are loaded, and which of them clients may pick."""
    state = runtime.current()
    config = state.config
    return {
        "object": "list",
        "default": config.default,
        "header": config.header,
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


@router.get("/v1/moe_routing/statistics")
async def read_statistics(request: Request) -> dict[str, Any]:
    """Active experts counted since the start, summed over decode steps, per MoE layer."""
    from sglang.srt.entrypoints import http_server

    manager = http_server._global_state.tokenizer_manager
    states = [state[KEY] for state in await manager.get_internal_state()]
    return {"object": "list", "data": states}


def add_routes(app: FastAPI) -> None:
    """Add routes and the response header. Called once, before the app starts."""
    app.include_router(router)
    app.add_middleware(PolicyHeaderMiddleware)
