"""Around ``ModelRunner.load_model``: attach to the layers of the model just loaded.

Why here: the model is known, memory pools are not sized yet (so that similarity matrices are
accounted for) and graphs are not captured. An exception here stops the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group

from .... import environment, runtime
from ....engine.fatal import ends_on_error
from ....engine.hooking import Hook
from ....runtime.metrics import Exporter
from ...attach import attach
from ...refusals import refuse_recording_under_graphs, refuse_unsupported


def around(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.is_draft_worker:
        return original(self, *args, **kwargs)
    with ends_on_error():
        refuse_unsupported(self.server_args)
        refuse_recording_under_graphs(self.server_args)
    result = original(self, *args, **kwargs)
    with ends_on_error():
        attach(runtime.current(), self)
    if os.environ.get(environment.EMULATE_GRAPHS) == "1":
        from ....cpu.emulated_graphs import EmulatedGraphBackend

        EmulatedGraphBackend.as_captured = staticmethod(runtime.current().model.as_captured)
    if self.server_args.enable_metrics and get_tp_group().rank_in_group == 0:
        Exporter(runtime.current(), torch.device(self.device)).start()
    return result


HOOK = Hook(
    target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    kind="around",
    function=around,
)
