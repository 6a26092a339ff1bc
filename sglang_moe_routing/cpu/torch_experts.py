"""The experts of a layer in plain torch.

SGLang's own (`moe_forward_native`) fails on the id -1, which free slots have.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import swiglu_gpt_oss_sigmoid_alpha
from torch import Tensor
from torch.nn import functional


def run_experts(layer: Any, hidden_states: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Weighted sum of each row's experts.

    Slots with id -1 or weight 0 are skipped: they neither load an expert nor add anything. An
    expert may occur in several slots of a row.

    Args:
        layer: a `FusedMoE` with ``w13_weight [N, 2 * I, H]``, ``w2_weight [N, H, I]`` and
            optional biases.
        hidden_states: ``[num_tokens, H]``.
        weights: float ``[num_tokens, top_k]``.
        ids: integer ``[num_tokens, top_k]``.

    Returns:
        ``[num_tokens, H]`` in the dtype of `hidden_states`.

    Raises:
        ValueError: an id is neither -1 nor an expert.
    """
    top_k = ids.shape[1]
    flat = ids.flatten()
    _check_ids(layer, flat)
    slots = ((flat >= 0) & (weights.flatten() != 0)).nonzero().flatten()
    slots = slots[flat[slots].argsort(stable=True)]  # grouped by expert
    experts, counts = flat[slots].unique_consecutive(return_counts=True)
    results = hidden_states.new_zeros(flat.shape[0], hidden_states.shape[1])
    chunks = slots.split(counts.tolist())
    for expert, chunk in zip(experts.tolist(), chunks, strict=True):
        results[chunk] = _run_expert(layer, expert, hidden_states[chunk // top_k])
    weighted = results.view(*ids.shape, hidden_states.shape[1]).to(
        weights.dtype
    ) * weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _check_ids(layer: Any, ids: Tensor) -> None:
    num_experts = layer.w13_weight.shape[0]
    wrong = ids[(ids < -1) | (ids >= num_experts)]
    if wrong.numel():
        raise ValueError(
            f"layer {layer.layer_id}: topk_ids has {wrong[0].item()}: expected -1 or an expert "
            f"below {num_experts}"
        )


def _run_expert(layer: Any, expert: int, tokens: Tensor) -> Tensor:
    gate_up = _linear(tokens, layer.w13_weight, getattr(layer, "w13_weight_bias", None), expert)
    activated = _activate(layer.moe_runner_config, gate_up)
    return _linear(activated, layer.w2_weight, getattr(layer, "w2_weight_bias", None), expert)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = functional.linear(x, weight[expert])
    return y if bias is None else (y.float() + bias[expert]).to(y.dtype)


def _activate(config: Any, gate_up: Tensor) -> Any:
    if config.gemm1_alpha is not None:  # GPT-OSS
        if not config.gate_up_interleaved:
            gate_up = gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return swiglu_gpt_oss_sigmoid_alpha(gate_up, config.gemm1_alpha, config.gemm1_clamp_limit)
    return (SiluAndMul() if config.activation == "silu" else GeluAndMul())(gate_up)
