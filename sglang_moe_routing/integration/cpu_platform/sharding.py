"""Around ``adjust_config_with_unaligned_cpu_tp``: keep the model's own sizes.

SGLang pads heads and expert sizes on the device "cpu" for its AMX kernels, and pads the weights
to match only on its own CPU platform. On the portable one there is nothing to pad for, and weights
would no longer fit their parameters under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hooking import Hook


def around(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    return model_config


HOOK = Hook(
    target="sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
    parameters=("model_config", "load_config", "tp_size"),
    kind="around",
    function=around,
)
