"""Decode and prefill graphs.

Around ``DecodeCudaGraphRunner.capture``: bake the re-routing into decode graphs. It reads policy
ids from one static buffer, so replay needs no Python.

Around ``DecodeCudaGraphRunner.capture_one_shape``: every shape, and every run of it, must ask every
layer. A replacement of the model's forward may cover some shapes and not others.

Around ``PrefillCudaGraphRunner.can_run_graph``: prefill graphs are captured vanilla; a forward
whose plan re-routes rows (MIXED batches, policies of phase 'all') must run eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .... import runtime
from ....engine.fatal import ends_on_error
from ....engine.hooking import Hook


def around_capture(original: Callable[..., Any], self: Any) -> Any:
    if self.model_runner.is_draft_worker:
        return original(self)
    model = runtime.current().model
    with ends_on_error(), model.reading, model.capture():
        return original(self)


def around_capture_shape(
    original: Callable[..., Any],
    self: Any,
    size: int,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if self.model_runner.is_draft_worker:
        return original(self, size, forward, *args, **kwargs)
    name = f"the decode graph of {size} requests"

    @functools.wraps(forward)  # SGLang reads its parameters
    def checked(*inputs: Any, **options: Any) -> Any:
        with runtime.current().model.graph_forward(name):
            return forward(*inputs, **options)

    return original(self, size, checked, *args, **kwargs)


def around_can_run(original: Callable[..., Any], self: Any, forward_batch: Any) -> Any:
    plan = runtime.current().model.plan
    if plan is not None and plan.reroutes:
        return False
    return original(self, forward_batch)


CAPTURE = Hook(
    target="sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture",
    kind="around",
    function=around_capture,
)
CAPTURE_SHAPE = Hook(
    target=(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner."
        "DecodeCudaGraphRunner.capture_one_shape"
    ),
    kind="around",
    function=around_capture_shape,
)
PREFILL = Hook(
    target=(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner."
        "PrefillCudaGraphRunner.can_run_graph"
    ),
    kind="around",
    function=around_can_run,
)
