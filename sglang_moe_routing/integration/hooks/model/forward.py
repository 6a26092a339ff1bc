"""Around ``ModelRunner._forward_raw``: put the plan of this forward into force.

Why here: every eager and graph forward passes by, on the stream that runs the model, before the
eager runner replaces the `ForwardBatch` and drops foreign attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .... import runtime
from ....engine.fatal import ends_on_error
from ....engine.hooking import Hook
from ...marks import PLAN


def around(
    original: Callable[..., Any], self: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    plan = getattr(forward_batch, PLAN, None)
    if self.is_draft_worker or plan is None:
        return original(self, forward_batch, *args, **kwargs)
    model = runtime.current().model
    with ends_on_error(is_serving=True), model.forward(plan):
        output = original(self, forward_batch, *args, **kwargs)
        if not output.can_run_graph:
            model.check_every_layer_asked()
        return output


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner._forward_raw",
    kind="around",
    function=around,
)
