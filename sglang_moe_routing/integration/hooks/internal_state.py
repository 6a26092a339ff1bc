"""After ``SchedulerInternalStateController.get_internal_state``: add the active-expert counts.

Why here: an existing round trip from the HTTP process to every scheduler, in step with the event
loop, so that reading the counts never races with a forward.

Around ``TokenizerControlMixin.get_internal_state``: SGLang's ``/server_info`` shows the whole state
and asks for none of our API keys, so our part is kept from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import http_server, runtime
from ..hooking import Hook
from ..reloading import ERROR
from ..statistics import KEY
from .reload import PARTICIPANT


def after(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    state = runtime.current()
    layers = state.statistics.read() if state.statistics else None
    result.internal_state[KEY] = {
        "config_sha256": state.loaded.sha256,
        "kernels": state.kernels,
        "experts": state.experts,
        "layers": layers,
        "policies": state.row_counts.read() if state.row_counts else None,
        ERROR: PARTICIPANT.error,
    }


async def around_read(original: Callable[..., Any], self: Any) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = await original(self)
    if http_server.is_there() and not http_server.is_asked_by_us.get():
        for state in states:
            state.pop(KEY, None)
    return states


HOOK = Hook(
    target=(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state"
    ),
    parameters=("self", "recv_req"),
    kind="after",
    function=after,
)
READ = Hook(
    target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
    parameters=("self",),
    kind="around",
    function=around_read,
    main_only=True,
)
