"""Before memory is released or resumed: refused, since a CPU has no memory saver.

Why in the HTTP process: there an error is the request's answer; in a scheduler it ends the server.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ...errors import EngineError
from ..hooking import Hook


def refuse(self: Any, obj: Any, request: Any = None) -> NoReturn:
    raise EngineError(
        "memory is neither released nor resumed on the portable CPU platform; the server serves "
        "on. Stop it to free its memory"
    )


HOOKS = (
    Hook(
        target=(
            "sglang.srt.managers.tokenizer_control_mixin."
            "TokenizerControlMixin.release_memory_occupation"
        ),
        parameters=("self", "obj", "request"),
        kind="before",
        function=refuse,
    ),
    Hook(
        target=(
            "sglang.srt.managers.tokenizer_control_mixin."
            "TokenizerControlMixin.resume_memory_occupation"
        ),
        parameters=("self", "obj", "request"),
        kind="before",
        function=refuse,
    ),
)
