"""The MoE forward of the portable CPU platform: SGLang's layer around a `Runner`."""

from __future__ import annotations

from typing import Any

from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from .experts import RUNNER


def register() -> None:
    """Make SGLang use `forward` for unquantised experts on this platform."""
    BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, forward, "native")


def forward(self: Any, layer: Any, dispatch_output: Any) -> StandardCombineInput:
    """Run the experts of one MoE layer with the runner chosen at start-up."""
    weights, ids, _ = dispatch_output.topk_output
    hidden_states = dispatch_output.hidden_states
    if layer.moe_runner_config.apply_router_weight_on_input:  # one expert per token
        hidden_states = hidden_states * weights.to(hidden_states.dtype)
        weights = (weights != 0).to(weights.dtype)
    runner = getattr(layer, RUNNER)
    return StandardCombineInput(hidden_states=runner.run(layer, hidden_states, weights, ids))
