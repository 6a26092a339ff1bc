"""Hooks of the portable CPU platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ..engine.fatal import ends_on_error
from ..engine.hooking import Hook
from ..errors import EngineError
from . import invariant_linear
from .experts import RUNNER, TORCH, choose_runner


def keep_sizes(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang pads heads and expert sizes on the device "cpu" for its AMX kernels, and pads the
    weights to match only on its own CPU platform. On the portable one there is nothing to pad for,
    and weights would no longer fit their parameters under tensor parallelism."""
    return model_config


def choose_at_start(
    original: Callable[..., Any], self: Any, layer: Any, moe_runner_config: Any
) -> Any:
    """Choose what runs a layer's experts before weights are loaded."""
    result = original(self, layer, moe_runner_config)
    with ends_on_error():
        runner = choose_runner(moe_runner_config, layer.w13_weight.dtype)
    if runner is not TORCH:
        invariant_linear.register()
    setattr(layer, RUNNER, runner)
    return result


def refuse_release(self: Any, obj: Any, request: Any = None) -> NoReturn:
    """A CPU has no memory saver. Refused in the HTTP process, where an error is the request's
    answer; in a scheduler it would end the server."""
    raise EngineError(
        "memory is neither released nor resumed on the portable CPU platform; the server serves "
        "on. Stop it to free its memory"
    )


HOOKS = (
    Hook(
        target="sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        kind="around",
        function=keep_sizes,
    ),
    Hook(
        target="sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.create_moe_runner",
        kind="around",
        function=choose_at_start,
    ),
    Hook(
        target=(
            "sglang.srt.managers.tokenizer_control_mixin."
            "TokenizerControlMixin.release_memory_occupation"
        ),
        kind="before",
        function=refuse_release,
    ),
    Hook(
        target=(
            "sglang.srt.managers.tokenizer_control_mixin."
            "TokenizerControlMixin.resume_memory_occupation"
        ),
        kind="before",
        function=refuse_release,
    ),
)
