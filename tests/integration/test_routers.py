"""`make_router` against SGLang's own routers: same experts, same weights, family by family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

topk = pytest.importorskip("sglang.srt.layers.moe.topk")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: E402

from sglang_moe_routing.engine import compat, signatures  # noqa: E402
from sglang_moe_routing.errors import EngineError  # noqa: E402
from sglang_moe_routing.integration.attach import (  # noqa: E402
    _routed_layers,
)
from sglang_moe_routing.integration.routers import (  # noqa: E402
    KNOWN_ROUTER_SETTINGS,
    make_router,
)

NUM_ROWS = 64
BFLOAT16 = 2.0**-7  # relative; two roundings

SIGMOID = {"scoring_func": "sigmoid"}
GROUPED = {"use_grouped_topk": True, "scoring_func": "softmax"}
SCALED = {"routed_scaling_factor": 2.5}

# TopK arguments as each family's model file gives them for its published checkpoints:
# experts, experts per token, whether there is a correction bias, the rest.
ROUTERS: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    "qwen3_moe": (128, 8, False, {"renormalize": True}),
    "qwen2_moe": (60, 4, False, {"renormalize": False}),
    "mixtral": (8, 2, False, {"renormalize": True}),
    "olmoe": (64, 8, False, {"renormalize": False}),
    "gpt_oss": (32, 4, False, {"renormalize": True}),
    "deepseek_v2_lite": (  # greedy: one group
        64,
        6,
        False,
        {**GROUPED, "num_expert_group": 1, "topk_group": 1, "renormalize": False},
    ),
    "deepseek_v2": (  # group-limited greedy
        160,
        6,
        False,
        {
            **GROUPED,
            "num_expert_group": 8,
            "topk_group": 3,
            "renormalize": False,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3": (
        256,
        8,
        True,
        {**GROUPED, **SIGMOID, **SCALED, "num_expert_group": 8, "topk_group": 4},
    ),
    "kimi_k2": (
        384,
        8,
        True,
        {**GROUPED, **SIGMOID, **SCALED, "num_expert_group": 1, "topk_group": 1},
    ),
    "glm4_moe": (  # says softmax by omission; a biased grouped router is sigmoid all the same
        128,
        8,
        True,
        {**GROUPED, **SCALED, "num_expert_group": 1, "topk_group": 1},
    ),
    "minimax_m2": (256, 8, True, {**SIGMOID, "renormalize": True}),
    "sigmoid": (64, 6, False, {**SIGMOID, "renormalize": True}),
    "sigmoid groups": (
        64,
        6,
        False,
        {**GROUPED, **SIGMOID, "num_expert_group": 8, "topk_group": 2},
    ),
    "sqrtsoftplus": (256, 6, True, {"scoring_func": "sqrtsoftplus", **SCALED}),
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """SGLang compiles its grouped routers, which takes long and needs a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_config(name: str, **changes: Any) -> Any:
    num_experts, top_k, has_bias, arguments = ROUTERS[name]
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(num_experts, generator=generator) * 0.1 if has_bias else None
    settings = {
        "top_k": top_k,
        "correction_bias": bias,
        "torch_native": True,  # as on the portable CPU platform
        **arguments,
        **changes,
    }
    return topk.TopKConfig(**settings)


def route(config: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights of SGLang's router."""
    hidden_states = logits.new_zeros(logits.shape[0], 4)
    output = topk.select_experts(hidden_states, logits, config, layer_id=0)
    return output.topk_ids.long(), output.topk_weights


def make_logits(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUM_ROWS, ROUTERS[name][0], generator=generator) * 2).to(dtype)


def check(config: Any, logits: Tensor, top_k: int, rounding: float = 0.0) -> None:
    """The engine's experts are the best by our scores; its weights are our gates.

    Args:
        rounding: relative error of the engine's own scores, where it computes them in less.
    """
    ids, weights = (column[:, :top_k] for column in route(config, logits))
    router = make_router(config, "a test")
    scores, gates = router.score(logits)

    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, True)
    worst_chosen = scores.masked_fill(~chosen, torch.inf).amin(dim=1)
    best_left_out = scores.masked_fill(chosen, -torch.inf).amax(dim=1)
    assert (chosen.sum(dim=1) == top_k).all()
    assert (worst_chosen >= best_left_out - rounding).all()

    expected = gates.gather(1, ids)
    if router.renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        weights.float(), expected * router.scale, rtol=1e-5 + rounding, atol=1e-7
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_scores_and_gates_are_the_engines(name: str) -> None:
    check(make_config(name), make_logits(name), ROUTERS[name][1])


@pytest.mark.parametrize("name", ROUTERS)
def test_scaling_factor_counts_only_where_the_router_applies_it(name: str) -> None:
    factor = {"routed_scaling_factor": 2.5}
    plain = make_config(name, **factor)
    fused = make_config(name, **factor, apply_routed_scaling_factor_on_output=True)
    assert make_router(plain, "a test").scale == 1.0
    if not fused.renormalize and not compat.SCALES_PLAIN_WEIGHTS:
        with pytest.raises(EngineError, match="a scale on weights that are not renormalised"):
            make_router(fused, "a test")
        return
    assert make_router(fused, "a test").scale == 2.5
    if fused.use_grouped_topk or compat.SCALES_PLAIN_WEIGHTS:  # else it ends SGLang itself
        check(fused, make_logits(name), ROUTERS[name][1])


@pytest.mark.parametrize("name", ROUTERS)
def test_renormalisation_follows_the_config(name: str) -> None:
    for renormalize in (False, True):
        config = make_config(name, renormalize=renormalize)
        check(config, make_logits(name), ROUTERS[name][1])


def one_shared_expert() -> dict[str, Any]:
    """The setting of a router, which has another name in older releases."""
    if not compat.BINDS_RUNNERS:
        return {"num_fused_shared_experts": 1}
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    return {"shared_experts": SharedExpertsConfig(num_fused_shared_experts=1)}


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_fused_shared_experts_leave_the_routed_columns_alone(name: str) -> None:
    """The router appends the shared expert's column: ids and weights of the others stay."""
    top_k = ROUTERS[name][1]
    config = make_config(name, top_k=top_k + 1, **one_shared_expert())
    ids, _ = route(config, make_logits(name))
    assert ids.shape == (NUM_ROWS, top_k + 1)
    assert (ids[:, top_k] >= ROUTERS[name][0]).all()
    check(config, make_logits(name), top_k)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "olmoe", "sqrtsoftplus"])
def test_half_precision_logits_are_scored_in_float32(name: str) -> None:
    """Plain routers widen bfloat16 logits, as ours do; exact ties abound."""
    config = make_config(name, correction_bias=None)
    check(config, make_logits(name, torch.bfloat16), ROUTERS[name][1])


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "glm4_moe", "minimax_m2"])
def test_half_precision_scores_of_the_engine_are_met_within_rounding(name: str) -> None:
    """Grouped and biased routers of the engine score in the logits' own precision; ours do not."""
    config = make_config(name)
    check(config, make_logits(name, torch.bfloat16), ROUTERS[name][1], rounding=BFLOAT16)


def custom(**_: Any) -> None:
    """A routing function of a model's own."""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"custom_routing_function": custom}, "a custom routing function"),
        ({"fused_gate_packed_ids": True}, "packed expert ids"),
        ({"correction_bias": torch.zeros(128)}, "softmax with a correction bias"),
        ({"scoring_func": "relu"}, "scoring function 'relu'"),
    ],
)
def test_routers_that_cannot_be_recomputed_are_refused(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(EngineError, match=f"layer 7: routers with {reason} are not supported"):
        make_router(make_config("qwen3_moe", **changes), "layer 7")


def test_every_setting_of_sglangs_router_is_known() -> None:
    """Of every supported release; test_signatures.py holds the files to what is installed."""
    lines = [
        line.split(":")[0].strip()
        for name in signatures.supported()
        for line in signatures.Release.read(name).symbols[f"{topk.__name__}.TopKConfig"][1:]
    ]
    assert set(lines) == KNOWN_ROUTER_SETTINGS


def test_a_setting_that_nobody_has_read_passes_at_its_default_only() -> None:
    @dataclasses.dataclass
    class Newer(topk.TopKConfig):  # type: ignore[misc, name-defined]  # sglang is untyped
        shiny: float = 0.0

    make_router(Newer(top_k=8), "layer 7")
    with pytest.raises(EngineError, match=r"layer 7: .*does not know.*: shiny 0.5"):
        make_router(Newer(top_k=8, shiny=0.5), "layer 7")


def make_model(routers: list[int], experts: list[int]) -> torch.nn.Module:
    """SGLang's modules for these layers, but for their contents."""
    model = torch.nn.Module()
    model.routers = torch.nn.ModuleList(make_module(topk.TopK, layer) for layer in routers)
    model.experts = torch.nn.ModuleList(make_module(FusedMoE, layer) for layer in experts)
    return model


def make_module(kind: Any, layer: int) -> Any:
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.layer_id, module.is_shared_fused_moe = layer, False
    return module


def test_every_layer_has_its_router_and_its_experts() -> None:
    """Routers of other layers, as of a draft, are none of ours."""
    model: Any = make_model([7, 1, 7, 0], [1, 0])
    expected = {0: (model.routers[3], model.experts[1]), 1: (model.routers[1], model.experts[0])}
    assert _routed_layers(model) == expected


@pytest.mark.parametrize(
    ("routers", "experts", "named"),
    [
        ([0, 1, 1], [0, 1], r"routers\.1 and routers\.2"),
        ([0, 1], [0, 0, 1], r"experts\.0 and experts\.1"),
    ],
)
def test_two_modules_of_one_layer_are_refused(
    routers: list[int], experts: list[int], named: str
) -> None:
    with pytest.raises(EngineError, match=f"{named} both belong to MoE layer"):
        _routed_layers(make_model(routers, experts))
