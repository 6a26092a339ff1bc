"""Around ``TokenizerControlMixin.get_internal_state``: keep our part of it from SGLang's routes.

SGLang's ``/server_info`` shows the whole state and asks for none of our API keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....engine.hooking import Hook
from ....runtime.statistics import KEY
from ... import http_server


async def around(original: Callable[..., Any], self: Any) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = await original(self)
    if http_server.is_there() and not http_server.is_asked_by_us.get():
        for state in states:
            state.pop(KEY, None)
    return states


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
    kind="around",
    function=around,
)
