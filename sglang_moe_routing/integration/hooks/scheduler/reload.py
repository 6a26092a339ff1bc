"""Around ``SchedulerInternalStateController.set_internal_state``: a scheduler's part in reloads.

Why here: an existing request from the HTTP process that reaches every scheduler and tensor-parallel
rank in step with its event loop, between two forwards, and is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import SetInternalStateReqOutput

from ....engine.hooking import Hook
from ...reloading import Participant

PARTICIPANT = Participant()


def around(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    if not PARTICIPANT.is_ours(recv_req.server_args):
        return original(self, recv_req)
    is_done = PARTICIPANT.handle(recv_req.server_args)
    return SetInternalStateReqOutput(updated=is_done)


HOOK = Hook(
    target=(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.set_internal_state"
    ),
    kind="around",
    function=around,
)
