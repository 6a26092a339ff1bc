"""Decode and prefill graphs.

Around ``DecodeCudaGraphRunner.capture``: bake the re-routing into decode graphs. It reads policy
ids from one static buffer, so replay needs no Python.

Around ``PrefillCudaGraphRunner.can_run_graph``: prefill graphs are captured vanilla; a forward
whose plan re-routes rows (MIXED batches, policies of phase 'all') must run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import runtime
from ..hooking import Hook


def around_capture(original: Callable[..., Any], self: Any) -> Any:
    if self.model_runner.is_draft_worker:
        return original(self)
    state = runtime.current()
    with state.reading, state.capture():
        return original(self)


def around_can_run(original: Callable[..., Any], self: Any, forward_batch: Any) -> Any:
    plan = runtime.current().plan
    if plan is not None and plan.reroutes:
        return False
    return original(self, forward_batch)


CAPTURE = Hook(
    target="sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture",
    parameters=("self",),
    kind="around",
    function=around_capture,
)
PREFILL = Hook(
    target=(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner."
        "PrefillCudaGraphRunner.can_run_graph"
    ),
    parameters=("self", "forward_batch"),
    kind="around",
    function=around_can_run,
)
