"""The MoE forward of the portable CPU platform against a plain float64 sum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

moe = pytest.importorskip("sglang_moe_routing.integration.cpu_platform.moe")

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 8


def make_layer(dtype: torch.dtype, activation: str = "silu", bias: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype) / 4

    layer = SimpleNamespace(
        w13_weight=random(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        w2_weight=random(NUM_EXPERTS, HIDDEN, INTERMEDIATE),
        moe_runner_config=SimpleNamespace(
            activation=activation,
            gemm1_alpha=None,
            gemm1_clamp_limit=None,
            apply_router_weight_on_input=False,
        ),
    )
    if bias:
        layer.w13_weight_bias = random(NUM_EXPERTS, 2 * INTERMEDIATE).float()
        layer.w2_weight_bias = random(NUM_EXPERTS, HIDDEN).float()
    return layer


def expected(layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.GELU(approximate="tanh")}
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row].tolist(), ids[row].tolist(), strict=True):
            if expert < 0 or weight == 0:
                continue
            y = layer.w13_weight[expert].double() @ x[row].double()
            if hasattr(layer, "w13_weight_bias"):
                y += layer.w13_weight_bias[expert]
            gate, up = y.chunk(2)
            y = layer.w2_weight[expert].double() @ (
                act[layer.moe_runner_config.activation](gate) * up
            )
            if hasattr(layer, "w2_weight_bias"):
                y += layer.w2_weight_bias[expert]
            out[row] += weight * y
    return out


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)],  # bf16: 8 bits, three roundings
)
def test_forward_equals_the_sum_over_slots(
    activation: str, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    layer = make_layer(dtype, activation, bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, HIDDEN, generator=generator).to(dtype)
    ids = torch.randint(-1, NUM_EXPERTS, (9, 4), generator=generator)
    ids[0] = 3  # one expert in every slot
    weights = torch.rand(9, 4, generator=generator)
    weights[1] = 0
    found = moe.run_experts(layer, x, weights, ids)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected(layer, x, weights, ids), atol=tolerance)


def test_experts_of_weight_0_are_never_read() -> None:
    layer = make_layer(torch.float32)
    layer.w13_weight[5] = torch.nan
    x, ids = torch.ones(2, HIDDEN), torch.tensor([[1, 5], [2, 5]])
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert torch.isfinite(moe.run_experts(layer, x, weights, ids)).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_slot_at_all_gives_zeros(num_tokens: int) -> None:
    x, ids = torch.ones(num_tokens, HIDDEN), torch.full((num_tokens, 2), -1)
    found = moe.run_experts(make_layer(torch.float32), x, torch.ones(num_tokens, 2), ids)
    assert found.shape == (num_tokens, HIDDEN)
    assert not found.any()


def test_unknown_activation_is_refused() -> None:
    layer = make_layer(torch.float32, "swish-like")
    with pytest.raises(NotImplementedError, match="swish-like"):
        moe.run_experts(layer, torch.ones(1, HIDDEN), torch.ones(1, 1), torch.zeros(1, 1).long())
