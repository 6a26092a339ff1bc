"""The experts of an MoE layer on a CPU, in C++ (csrc/cpu/experts.h)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels.native import choose

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]

_ACTIVATIONS: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}

DTYPES = (torch.bfloat16, torch.float32)
"""Element types of the weights that the runner takes."""


def run_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: Activation = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    is_interleaved: bool = False,
    alpha: float = 1.0,
    limit: float = math.inf,
) -> Tensor:
    """Weighted sum of each row's experts, with torch's number of threads.

    Each active expert's weights are read once, where they lie. Slots with id -1 or weight 0 are
    skipped; the weights of an expert that occurs twice in a row add up. A row's result does not
    depend, bit for bit, on the other rows or on the number of threads.

    Args:
        hidden_states: ``[num_tokens, H]``, bfloat16 or float32.
        w13: ``[N, 2 * I, H]`` of the same type, gate then up; columns must be adjacent.
        w2: ``[N, H, I]`` likewise.
        topk_weights: float ``[num_tokens, top_k]``.
        topk_ids: int32 or int64 ``[num_tokens, top_k]``.
        activation: ``silu(gate) * up``, ``gelu(gate) * up`` by the tanh formula, or
            ``g * sigmoid(alpha * g) * (u + 1)`` with ``g = min(gate, limit)`` and ``u = up``
            clamped to ``[-limit, limit]`` (GPT-OSS).
        w13_bias: float32 or bfloat16 ``[N, 2 * I]``.
        w2_bias: float32 or bfloat16 ``[N, H]``.
        is_interleaved: gate and up rows take turns in `w13`.
        alpha, limit: of ``clamped_swiglu``.

    Returns:
        ``[num_tokens, H]`` in the type of `hidden_states`; sums are float32.

    Raises:
        KernelError: there are no compiled CPU kernels.
        ValueError: an argument has the wrong shape, type or layout, or an id is neither -1 nor an
            expert.
    """
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    _module().experts(
        hidden_states,
        w13,
        w2,
        w13_bias,
        w2_bias,
        topk_weights,
        topk_ids,
        out,
        _ACTIVATIONS[activation],
        is_interleaved,
        alpha,
        limit,
        torch.get_num_threads(),
    )
    return out


def linear(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` with torch's number of threads and sums in float32.

    A row's result does not depend, bit for bit, on the other rows or on the number of threads.

    Args:
        input: ``[num_tokens, in_features]``, bfloat16 or float32; columns must be adjacent.
        weight: ``[out_features, in_features]`` likewise.

    Returns:
        ``[num_tokens, out_features]`` in the same type. Raises `KernelError`, `ValueError`.
    """
    out = input.new_empty(input.shape[0], weight.shape[0])
    _module().linear(input, weight, out, torch.get_num_threads())
    return out


def stream_read(tensor: Tensor) -> int:
    """Read a contiguous tensor once, with torch's number of threads, as fast as memory allows.

    Returns:
        A checksum, so that nothing is left out. Raises `KernelError`, `ValueError`.
    """
    return int(_module().stream_read(tensor, torch.get_num_threads()))


def _module() -> Any:
    implementation = choose("cpu")
    if not implementation.is_native:
        raise KernelError(f"no compiled CPU kernels: {implementation.reason}")
    return implementation.module
