"""Which code runs the experts of a layer on the portable CPU platform, decided at start-up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import environment
from ..errors import EngineError, KernelError
from ..kernels import Implementation, choose
from . import compiled_experts

RUNNER = "moe_routing_experts"
"""Attribute of a `FusedMoE` layer: its `Runner`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    """Runs the experts of a layer.

    Attributes:
        name: such as ``cpu amx`` or ``torch``.
        run: layer, hidden states ``[num_tokens, H]``, weights and ids ``[num_tokens, top_k]`` to
            ``[num_tokens, H]``.
    """

    name: str
    run: Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def _run_torch(layer: Any, hidden_states: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    from .torch_experts import run_experts  # imports layers of sglang

    return run_experts(layer, hidden_states, weights, ids)


TORCH = Runner("torch", _run_torch)


def choose_runner(config: Any, dtype: torch.dtype) -> Runner:
    """The runner for layers of this `MoeRunnerConfig` and element type.

    Raises:
        EngineError: no runner computes what the layer needs, or the choice is unknown.
        KernelError: the compiled runner is asked for and cannot be had.
    """
    problem = _unsupported(config)
    if problem:
        raise EngineError(f"experts with {problem} are not supported on the portable CPU platform")
    choice = read_choice()
    if choice == "torch":
        return _announce(TORCH, f"{environment.CPU_EXPERTS}=torch")
    implementation = choose("cpu")
    reason = _not_native(implementation, dtype)
    if reason and choice == "native":
        raise KernelError(f"{environment.CPU_EXPERTS}=native, but {reason}")
    if reason:
        return _announce(TORCH, reason, logging.WARNING)
    return _announce(Runner(implementation.name, _run_native), "")


def read_choice() -> str:
    """``auto``, ``native`` or ``torch``. Raises `EngineError` for anything else."""
    choice = os.environ.get(environment.CPU_EXPERTS, "auto")
    if choice not in ("auto", "native", "torch"):
        raise EngineError(f"{environment.CPU_EXPERTS}={choice!r} is not one of auto, native, torch")
    return choice


@cache
def _announce(runner: Runner, reason: str, level: int = logging.INFO) -> Runner:
    """Says once in the log what runs and why."""
    logger.log(level, "experts run by %s%s", runner.name, f" ({reason})" if reason else "")
    return runner


def _not_native(implementation: Implementation, dtype: torch.dtype) -> str:
    if not implementation.is_native:
        return implementation.reason
    if dtype not in compiled_experts.DTYPES:
        return f"the compiled runner takes bfloat16 and float32 weights, not {dtype}"
    return ""


def _unsupported(config: Any) -> str:
    """What of a layer neither runner computes; empty if nothing."""
    if config.activation not in ("silu", "gelu"):
        return f"activation {config.activation!r}"
    problems = {
        "apply_router_weight_on_input and more than one expert per token": (
            config.apply_router_weight_on_input and (config.top_k or 2) > 1
        ),
        "an ungated activation": not config.is_gated,
        f"swiglu_limit {config.swiglu_limit}": config.swiglu_limit is not None,
        f"gemm1_beta {config.gemm1_beta}": config.gemm1_beta not in (None, 1.0),
        "gemm1_alpha without gemm1_clamp_limit": (
            config.gemm1_alpha is not None and config.gemm1_clamp_limit is None
        ),
        "gemm1_alpha and another activation than silu": (
            config.gemm1_alpha is not None and config.activation != "silu"
        ),
        "uncombined outputs": config.no_combine,
    }
    return next((problem for problem, is_present in problems.items() if is_present), "")


def _run_native(layer: Any, hidden_states: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    config = layer.moe_runner_config
    activation: compiled_experts.Activation = "silu" if config.activation == "silu" else "gelu_tanh"
    clamped: dict[str, Any] = {}
    if config.gemm1_alpha is not None:  # GPT-OSS
        activation = "clamped_swiglu"
        clamped = {
            "is_interleaved": config.gate_up_interleaved,
            "alpha": config.gemm1_alpha,
            "limit": config.gemm1_clamp_limit,
        }
    try:
        return compiled_experts.run_experts(
            hidden_states,
            layer.w13_weight,
            layer.w2_weight,
            weights,
            ids,
            activation=activation,
            w13_bias=getattr(layer, "w13_weight_bias", None),
            w2_bias=getattr(layer, "w2_weight_bias", None),
            **clamped,
        )
    except ValueError as error:
        raise ValueError(f"layer {layer.layer_id}: {error}") from None
