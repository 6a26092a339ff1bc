"""After ``SchedulerInternalStateController.get_internal_state``: add the active-expert counts.

Why here: an existing round trip from the HTTP process to every scheduler, in step with the event
loop, so that reading the counts never races with a forward.
"""

from __future__ import annotations

from typing import Any

from .... import runtime
from ....engine.hooking import Hook
from ....runtime.statistics import KEY
from ...reloading import ERROR
from .reload import PARTICIPANT


def after(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    state = runtime.current()
    model = state.model
    counts = model.statistics
    result.internal_state[KEY] = {
        "config_sha256": state.loaded.sha256,
        "kernels": model.kernels,
        "experts": model.experts,
        "layers": counts.read() if counts else None,
        "policies": counts.rows.read() if counts else None,
        ERROR: PARTICIPANT.error,
    }


HOOK = Hook(
    target=(
        "sglang.srt.managers.scheduler_components.internal_state."
        "SchedulerInternalStateController.get_internal_state"
    ),
    kind="after",
    function=after,
)
