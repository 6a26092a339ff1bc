"""Weights that change while the server runs.

Around the ways of ``SchedulerWeightUpdaterManager`` that let other weights in: an update from disk
or over IPC, the session in which tensors and broadcasts are taken, and a release of memory. Why
here: every such request reaches every tensor-parallel rank here, between two forwards, and is
answered from here.

A similarity artifact was made for certain weights; an update under which a policy would go on with
an artifact of others is refused, on all tensor-parallel ranks or on none. Data-parallel replicas do
not ask each other: one may refuse what another takes. The client is told of a failure, and has to
repeat the update until all have taken it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqOutput,
    CheckWeightsReqOutput,
    UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromIPCReqOutput,
)

from .... import runtime
from ....engine.hooking import Hook
from ....errors import RoutingError
from ....runtime.weights import ServedWeights, check_former, check_weights, unknown
from .reload import PARTICIPANT


def around_disk(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    revision = self.tp_worker.model_runner.model_config.revision
    new = ServedWeights.of_checkpoint(recv_req.model_path, recv_req.load_format, revision)
    problem = _refusal(new)
    if problem:
        return UpdateWeightFromDiskReqOutput(success=False, message=problem, num_paused_requests=0)
    _lose("an update from disk that failed")
    result = original(self, recv_req)
    if result.success and self._session is None:  # a session may change them further
        runtime.current().model.weights = new
    return result


def around_ipc(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    return _unless_refused(original, self, recv_req, "IPC", UpdateWeightsFromIPCReqOutput)


def around_begin(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    how = "a weight-update session"
    return _unless_refused(original, self, recv_req, how, BeginWeightUpdateReqOutput)


def around_check(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """SGLang's own checker can overwrite the weights with random ones."""
    if recv_req.action != "reset_tensors":
        return original(self, recv_req)
    return _unless_refused(original, self, recv_req, "reset_tensors", CheckWeightsReqOutput)


def before_release(self: Any, recv_req: Any) -> None:
    """What comes back when memory is resumed is not what was there, unless it was backed up."""
    flags = self.scheduler.server_args
    is_weights = not recv_req.tags or GPU_MEMORY_TYPE_WEIGHTS in recv_req.tags
    if is_weights and flags.enable_memory_saver and not flags.enable_weights_cpu_backup:
        _lose("a release of their memory")


def _unless_refused(
    original: Callable[..., Any], self: Any, recv_req: Any, how: str, output: type
) -> Any:
    problem = _refusal(unknown(how))
    if problem:
        return output(success=False, message=problem)
    _lose(how)
    return original(self, recv_req)


def _refusal(new: ServedWeights) -> str:
    """Why a policy of some rank cannot be served with `new`; empty if all can."""
    problems = get_tp_group().all_gather_object(_problem(new))
    return next((f"weights not updated: {problem}" for problem in problems if problem), "")


def _problem(new: ServedWeights) -> str:
    state = runtime.current()
    try:
        check_weights(state.loaded, state.artifacts, new)
        if PARTICIPANT.staged:
            check_weights(PARTICIPANT.staged.loaded, PARTICIPANT.staged.artifacts, new)
        check_former(state.ids.in_use(), state.artifacts, new)
    except RoutingError as error:
        return str(error)
    return ""


def _lose(how: str) -> None:
    """Forget which weights are served, before they change: a failure may leave parts of both."""
    runtime.current().model.weights = unknown(how)


HOOKS = (
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater."
            "SchedulerWeightUpdaterManager.update_weights_from_disk"
        ),
        kind="around",
        function=around_disk,
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater."
            "SchedulerWeightUpdaterManager.update_weights_from_ipc"
        ),
        kind="around",
        function=around_ipc,
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater."
            "SchedulerWeightUpdaterManager.begin_weight_update"
        ),
        kind="around",
        function=around_begin,
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater."
            "SchedulerWeightUpdaterManager.check_weights"
        ),
        kind="around",
        function=around_check,
    ),
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater."
            "SchedulerWeightUpdaterManager.release_memory_occupation"
        ),
        kind="before",
        function=before_release,
    ),
)
