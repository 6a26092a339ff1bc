"""The MoE forwards that SGLang can run on a CPU, for measuring the compiled one beside them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from torch import Tensor

from .torch_experts import run_experts

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states ``[B, H]``, weights and ids ``[B, k]`` -> ``[B, H]``."""


def native_experts(
    w13: Tensor,
    w2: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
) -> Experts:
    """SGLang's own, `moe_forward_native`. No expert may occur twice in a row of ids.

    Args:
        w13, w2: ``[N, 2 * I, H]`` and ``[N, H, I]``.
        w13_bias, w2_bias: float32 ``[N, 2 * I]`` and ``[N, H]``.
        alpha, limit: GPT-OSS's activation; None for SwiGLU.
    """
    layer = _layer(w13, w2, w13_bias, w2_bias, alpha, limit)
    config = layer.moe_runner_config
    return lambda x, weights, ids: moe_forward_native(layer, x, (weights, ids, None), config)


def torch_experts(
    w13: Tensor,
    w2: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
) -> Experts:
    """The portable CPU platform's in plain torch; arguments as for `native_experts`."""
    layer = _layer(w13, w2, w13_bias, w2_bias, alpha, limit)
    return lambda x, weights, ids: run_experts(layer, x, weights, ids)


def _layer(
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    alpha: float | None,
    limit: float | None,
) -> Any:
    """What these forwards read of a `FusedMoE`."""
    return SimpleNamespace(
        num_experts=w13.shape[0],
        w13_weight=w13,
        w2_weight=w2,
        w13_weight_bias=w13_bias,
        w2_weight_bias=w2_bias,
        moe_runner_config=MoeRunnerConfig(
            activation="silu", gemm1_alpha=alpha, gemm1_clamp_limit=limit
        ),
    )
