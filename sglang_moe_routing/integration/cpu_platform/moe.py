"""The MoE forward of the portable CPU platform, in plain torch.

SGLang's own (`moe_forward_native`) fails on an expert that occurs twice in a row of ids and on -1,
both of which re-routing and padding produce.
"""

from __future__ import annotations

from typing import Any

from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import swiglu_gpt_oss_sigmoid_alpha
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch import Tensor
from torch.nn import functional


def register() -> None:
    """Make SGLang use `forward` for unquantised experts on this platform."""
    BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, forward, "native")


def forward(self: Any, layer: Any, dispatch_output: Any) -> StandardCombineInput:
    """Run the experts of one MoE layer; see `run_experts`."""
    weights, ids, _ = dispatch_output.topk_output
    hidden_states = dispatch_output.hidden_states
    config = layer.moe_runner_config
    if config.apply_router_weight_on_input:
        if ids.shape[1] != 1:
            raise NotImplementedError("apply_router_weight_on_input needs top_k = 1")
        hidden_states = hidden_states * weights.to(hidden_states.dtype)
        weights = (weights != 0).to(weights.dtype)
    return StandardCombineInput(hidden_states=run_experts(layer, hidden_states, weights, ids))


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
    """
    top_k = ids.shape[1]
    flat = ids.flatten()
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


def _run_expert(layer: Any, expert: int, tokens: Tensor) -> Tensor:
    gate_up = _linear(tokens, layer.w13_weight, getattr(layer, "w13_weight_bias", None), expert)
    activated = _activate(layer.moe_runner_config, gate_up)
    return _linear(activated, layer.w2_weight, getattr(layer, "w2_weight_bias", None), expert)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = functional.linear(x, weight[expert])
    return y if bias is None else (y.float() + bias[expert]).to(y.dtype)


def _activate(config: Any, gate_up: Tensor) -> Any:
    if config.activation == "silu" and config.gemm1_alpha is not None:  # GPT-OSS
        return swiglu_gpt_oss_sigmoid_alpha(gate_up, config.gemm1_alpha, config.gemm1_clamp_limit)
    if config.activation == "silu":
        return SiluAndMul()(gate_up)
    if config.activation == "gelu":
        return GeluAndMul()(gate_up)
    raise NotImplementedError(f"activation {config.activation!r} on the portable CPU platform")
