"""SGLang's HTTP server, as our routes and request checks see it."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any

from ..runtime.statistics import KEY

is_asked_by_us = ContextVar("is_asked_by_us", default=False)
"""Whether the task at hand reads the schedulers' internal states for a route of ours."""


def is_there() -> bool:
    """Whether this process serves HTTP. It does not in the offline `Engine`."""
    module = sys.modules.get("sglang.srt.entrypoints.http_server")
    return module is not None and module._global_state is not None


def tokenizer_manager() -> Any:
    """SGLang's `TokenizerManager` of this process."""
    from sglang.srt.entrypoints import http_server

    return http_server._global_state.tokenizer_manager


async def scheduler_states(manager: Any) -> list[dict[str, Any]]:
    """Our part of every scheduler's internal state, which SGLang's own routes do not show."""
    token = is_asked_by_us.set(True)
    try:
        return [dict(state[KEY]) for state in await manager.get_internal_state()]
    finally:
        is_asked_by_us.reset(token)


def is_own_warm_up(request: Any) -> bool:
    """Whether a request is SGLang's warm-up: its own, before it is up, without a key."""
    if tokenizer_manager().server_status.name != "Starting":
        return False
    if request is None:
        return True
    client, server = request.scope.get("client"), request.scope.get("server")
    return bool(client and server and client[0] == server[0])
