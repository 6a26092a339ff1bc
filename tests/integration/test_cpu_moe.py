"""The MoE forward of the portable CPU platform against a plain float64 sum."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sglang_moe_routing import environment
from sglang_moe_routing.errors import EngineError, KernelError
from sglang_moe_routing.kernels import CHOICE, native

runners = pytest.importorskip("sglang_moe_routing.cpu.experts")
torch_experts = pytest.importorskip("sglang_moe_routing.cpu.torch_experts")
invariant = pytest.importorskip("sglang_moe_routing.cpu.invariant_linear")

RUN: dict[str, Callable[..., Tensor]] = {
    "native": runners._run_native,
    "torch": torch_experts.run_experts,
}

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 8


def make_config(**changes: Any) -> Any:
    defaults = {
        "activation": "silu",
        "is_gated": True,
        "apply_router_weight_on_input": False,
        "top_k": 4,
        "no_combine": False,
        "gemm1_alpha": None,
        "gemm1_beta": None,
        "gemm1_clamp_limit": None,
        "swiglu_limit": None,
        "gate_up_interleaved": True,
    }
    return SimpleNamespace(**(defaults | changes))


def make_layer(dtype: torch.dtype, activation: str = "silu", bias: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype) / 4

    layer = SimpleNamespace(
        w13_weight=random(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        w2_weight=random(NUM_EXPERTS, HIDDEN, INTERMEDIATE),
        moe_runner_config=make_config(activation=activation),
        layer_id=7,
    )
    if bias:
        layer.w13_weight_bias = random(NUM_EXPERTS, 2 * INTERMEDIATE).float()
        layer.w2_weight_bias = random(NUM_EXPERTS, HIDDEN).float()
    return layer


def expected(layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row].tolist(), ids[row].tolist(), strict=True):
            if expert < 0 or weight == 0:
                continue
            y = layer.w13_weight[expert].double() @ x[row].double()
            if hasattr(layer, "w13_weight_bias"):
                y += layer.w13_weight_bias[expert]
            y = layer.w2_weight[expert].double() @ activate(layer.moe_runner_config, y)
            if hasattr(layer, "w2_weight_bias"):
                y += layer.w2_weight_bias[expert]
            out[row] += weight * y
    return out


def activate(config: Any, gate_up: Tensor) -> Tensor:
    if config.gemm1_alpha is None:
        gate, up = gate_up.chunk(2)
        if config.activation == "silu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh") * up
    gate, up = (gate_up[::2], gate_up[1::2]) if config.gate_up_interleaved else gate_up.chunk(2)
    gate = gate.clamp(max=config.gemm1_clamp_limit)
    up = up.clamp(-config.gemm1_clamp_limit, config.gemm1_clamp_limit)
    return gate * torch.sigmoid(gate * config.gemm1_alpha) * (up + 1)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"activation": "gelu"},
    "clamped": {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.5},
    "clamped, not interleaved": {
        "gemm1_alpha": 1.702,
        "gemm1_clamp_limit": 0.5,
        "gate_up_interleaved": False,
    },
}


@pytest.mark.parametrize("runner", RUN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)],  # bf16: 8 bits, three roundings
)
def test_both_runners_equal_the_sum_over_slots(
    runner: str, activation: str, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    layer = make_layer(dtype, bias=bias)
    layer.moe_runner_config = make_config(**ACTIVATIONS[activation])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, HIDDEN, generator=generator).to(dtype)
    ids = torch.randint(-1, NUM_EXPERTS, (9, 4), generator=generator)
    ids[0] = 3  # one expert in every slot
    weights = torch.rand(9, 4, generator=generator)
    weights[1] = 0
    found = RUN[runner](layer, x, weights, ids)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected(layer, x, weights, ids), atol=tolerance)


@pytest.mark.parametrize("runner", RUN)
def test_experts_of_weight_0_are_never_read(runner: str) -> None:
    layer = make_layer(torch.float32)
    layer.w13_weight[5] = torch.nan
    x, ids = torch.ones(2, HIDDEN), torch.tensor([[1, 5], [2, 5]])
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert torch.isfinite(RUN[runner](layer, x, weights, ids)).all()


@pytest.mark.parametrize("runner", RUN)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_slot_at_all_gives_zeros(runner: str, num_tokens: int) -> None:
    x, ids = torch.ones(num_tokens, HIDDEN), torch.full((num_tokens, 2), -1)
    found = RUN[runner](make_layer(torch.float32), x, torch.ones(num_tokens, 2), ids)
    assert found.shape == (num_tokens, HIDDEN)
    assert not found.any()


@pytest.mark.parametrize("runner", RUN)
@pytest.mark.parametrize("wrong", [NUM_EXPERTS, -2])
def test_an_id_that_is_no_expert_names_the_layer(runner: str, wrong: int) -> None:
    ids = torch.tensor([[0, wrong]])
    with pytest.raises(ValueError, match=rf"layer 7: .*{wrong}: expected -1 or an expert below 6"):
        RUN[runner](make_layer(torch.float32), torch.ones(1, HIDDEN), torch.ones(1, 2), ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish-like"}, "activation 'swish-like'"),
        ({"apply_router_weight_on_input": True}, "more than one expert per token"),
        ({"is_gated": False}, "an ungated activation"),
        ({"swiglu_limit": 7.0}, "swiglu_limit 7.0"),
        ({"gemm1_beta": 0.5}, "gemm1_beta 0.5"),
        ({"gemm1_alpha": 1.0}, "gemm1_alpha without gemm1_clamp_limit"),
        ({"no_combine": True}, "uncombined outputs"),
    ],
)
def test_what_no_runner_computes_is_refused_at_start_up(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        runners.choose_runner(make_config(**changes), torch.bfloat16)


def test_one_expert_per_token_may_be_weighted_on_input() -> None:
    config = make_config(apply_router_weight_on_input=True, top_k=1)
    assert runners.choose_runner(config, torch.float32)


def test_the_compiled_runner_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.CPU_EXPERTS, raising=False)
    if not native.choose("cpu").is_native:
        pytest.skip("no compiled kernels")
    assert runners.choose_runner(make_config(), torch.bfloat16).name.startswith("cpu ")
    assert runners.choose_runner(make_config(), torch.float16) is runners.TORCH


def test_the_runner_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.CPU_EXPERTS, "torch")
    assert runners.choose_runner(make_config(), torch.bfloat16) is runners.TORCH
    monkeypatch.setenv(environment.CPU_EXPERTS, "native")
    with pytest.raises(KernelError, match=r"native, but the compiled runner takes.*float16"):
        runners.choose_runner(make_config(), torch.float16)
    monkeypatch.setenv(environment.CPU_EXPERTS, "fast")
    with pytest.raises(EngineError, match="'fast' is not one of auto, native, torch"):
        runners.choose_runner(make_config(), torch.bfloat16)


def test_without_kernels_native_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "torch")
    native.choose.cache_clear()
    try:
        monkeypatch.setenv(environment.CPU_EXPERTS, "native")
        with pytest.raises(KernelError, match=f"native, but {CHOICE}=torch"):
            runners.choose_runner(make_config(), torch.bfloat16)
        monkeypatch.setenv(environment.CPU_EXPERTS, "auto")
        assert runners.choose_runner(make_config(), torch.bfloat16) is runners.TORCH
    finally:
        native.choose.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_torchs(dtype: torch.dtype) -> None:
    """`mm` and `addmm` as they replace torch's, for weights and for anything else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 40, generator=generator).to(dtype)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for b in (weight.T, weight.T.contiguous()):
        torch.testing.assert_close(invariant.mm(x, b), x @ b, **tolerance)
        for factors in ({}, {"beta": 0.5}, {"alpha": 2}):
            wanted = torch.addmm(bias, x, b, **factors)
            found = invariant.addmm(bias, x, b, **factors)
            torch.testing.assert_close(found, wanted, **tolerance)
    whole = torch.arange(12).view(3, 4)
    assert torch.equal(invariant.mm(whole, whole.T), whole @ whole.T)


def test_replaced_products_do_not_depend_on_the_batch() -> None:
    """In a process of its own: the replacement stays for good."""
    code = """
import torch
from torch.nn import functional
from sglang_moe_routing.cpu import invariant_linear
x, weight, bias = torch.randn(64, 256), torch.randn(512, 256), torch.randn(512)
def run(rows, bias):
    return functional.linear(rows, weight, bias)
def differs():
    sizes = (1, 2, 5, 9, 17, 33)
    return not all(torch.equal(run(x, b)[:n], run(x[:n].clone(), b))
                   for n in sizes for b in (None, bias))
print(differs())
invariant_linear.register()
invariant_linear.register()
with torch.inference_mode():
    print(differs())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
    assert "Overriding" not in done.stderr
