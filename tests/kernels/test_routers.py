"""The compiled implementations on router logits: from logits to scores and gates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_moe_routing.policies import FREE, Budget, Router, build_table
from sglang_moe_routing.testing import oracle
from tests.cases import (
    BUDGET_5,
    FLOATS,
    MAPPED,
    OEA_2,
    ROUTER_DEMAND_RTOL,
    SERE_1,
    Case,
    Spec,
    ask_oracle,
    examples,
    keep_off_close_demands,
    make_artifact,
    make_base,
    policy_ids,
    spec_of,
    table_of,
)
from tests.kernels.conftest import (
    Call,
    Implementation,
    ask_reference,
    engine_choice,
)
from tests.kernels.driver import Outcome

NUM_EXPERTS = (8, 60, 64, 128, 160, 256, 384)
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")

# The exponential is good to 2 units in the last place and a handful of roundings follow.
GATE_RTOL = 3e-6
# Two sums of gates and a quotient, each as good as their terms.
WEIGHT_RTOL = 1e-5
# How far two scores must lie apart where gates are rounded differently: a part of each gate, and
# what adding a bias rounds. And how far two group strengths.
SCORE_RTOL = 1e-6
SCORE_ATOL = 2e-7
STRENGTH_MARGIN = 2e-6
MASS_MARGIN = 3e-5

thorough = settings(max_examples=examples(80), deadline=None, database=None)
brief = settings(max_examples=examples(30), deadline=None, database=None)


@dataclass(frozen=True)
class Model:
    """Logits, the router that reads them, and the engine's choice."""

    logits: Tensor
    router: Router
    topk_ids: Tensor
    topk_weights: Tensor

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]


def as_case(model: Model, specs: tuple[Spec, ...], row_specs: tuple[int | None, ...]) -> Case:
    """The call with scores and gates worked out by the package's router."""
    scores, gates = model.router.score(model.logits.float(), model.topk_ids)
    rng = np.random.default_rng(0)
    return Case(
        scores=scores,
        gates=gates,
        topk_ids=model.topk_ids,
        topk_weights=model.topk_weights,
        specs=specs,
        row_specs=row_specs,
        artifacts={name: make_artifact(rng, "smooth", scores.shape[1]) for name in ("a", "b")},
        renormalize=model.router.renormalize,
        scale=model.router.scale,
    )


def call_of(case: Case, model: Model, seed: int) -> Call:
    return Call(
        scores=model.logits,
        policy_ids=policy_ids(case, torch.int32),
        table=table_of(case),
        router=model.router,
        topk_ids=case.topk_ids,
        topk_weights=case.topk_weights,
        seed=seed,
    )


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=WEIGHT_RTOL, atol=1e-37)


def assert_agrees(got: Outcome, expected: Outcome) -> None:
    assert got.topk_ids.tolist() == expected.topk_ids.tolist()
    assert torch.equal(got.union, expected.union)
    assert got.statistics == expected.statistics
    assert_close(got.topk_weights, expected.topk_weights)


# --- what could be rounded either way ----------------------------------------------------------


def has_close_masses(case: Case) -> bool:
    """A live row's partial gate mass is so close to its p that rounding decides."""
    for row in case.live:
        spec = case.spec(row)
        if spec is None or spec.get("p", 1.0) >= 1.0:
            continue
        base = oracle.rank_order(case.scores[row].tolist(), case.topk_ids[row].tolist())
        shares = oracle.mass_prefixes(case.gates[row].tolist(), base[: case.top_k])
        if any(abs(share - spec["p"]) < MASS_MARGIN for share in shares):
            return True
    return False


def has_close_scores(model: Model) -> bool:
    """Two experts or two groups of a row score so alike that rounding decides. Experts with equal
    logits and biases are no such case: they tie everywhere."""
    assert model.router.bias is not None
    gates = replace(model.router, num_groups=1, top_groups=1).score(model.logits.float())[1]
    for logits, row in zip(model.logits.float().tolist(), gates.tolist(), strict=True):
        bias = model.router.bias.tolist()
        scored = sorted(
            (gate + b, gate, logit, b)
            for logit, gate, b in zip(logits, row, bias, strict=True)
            if not math.isnan(logit)
        )
        if any(
            b[0] - a[0] < SCORE_RTOL * (a[1] + b[1]) + SCORE_ATOL and a[1:] != b[1:]
            for a, b in pairwise(scored)
        ):
            return True
        size = len(row) // model.router.num_groups
        both = list(zip(row, bias, strict=True))
        groups = [both[i : i + size] for i in range(0, len(row), size)]
        best = [sorted((g + b for g, b in group), reverse=True)[:2] for group in groups]
        strengths = sorted((sum(two), *two) for two in best)
        if len(groups) > 1 and any(
            b[0] - a[0] < STRENGTH_MARGIN and a[1:] != b[1:] for a, b in pairwise(strengths)
        ):
            return True
    return False


# --- cases -------------------------------------------------------------------------------------


def make_logits(rng: np.random.Generator, mode: str, shape: tuple[int, int]) -> np.ndarray:
    if mode == "smooth":
        return rng.normal(0, 2, shape)
    if mode == "wide":
        return rng.uniform(-60, 60, shape)
    if mode == "ties":
        return rng.choice((-2.0, -0.0, 0.0, 0.5, 3.0), shape)
    odd = (math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-42, -1e-42, 0.0, 1.0, -1.0, 40.0, -40.0)
    return rng.choice(odd, shape)


def make_separate(rng: np.random.Generator, shape: tuple[int, int], bias: np.ndarray) -> np.ndarray:
    """Logits whose sigmoids plus biases all lie apart."""
    n = shape[1]
    steps = np.array([rng.permutation(n) for _ in range(shape[0])]).reshape(shape)
    gates = 0.2 + 0.6 * (steps + rng.uniform(0.2, 0.8, shape)) / n - bias
    return np.asarray(np.log(gates / (1 - gates)))


def divisors(num_experts: int) -> list[int]:
    return [g for g in (2, 4, 5, 8, 16, 32) if num_experts % g == 0 and num_experts // g >= 2]


@st.composite
def models(
    draw: st.DrawFn,
    *,
    scorings: tuple[Any, ...] = SCORINGS,
    modes: tuple[str, ...] = ("smooth", "wide", "ties", "odd"),
    has_bias: bool = False,
    has_groups: bool = False,
    most_rows: int = 8,
    most_experts: int = 384,
) -> Model:
    num_experts = draw(st.sampled_from([n for n in NUM_EXPERTS if n <= most_experts]))
    num_rows = draw(st.integers(1, most_rows))
    top_k = draw(st.integers(1, min(num_experts, 10)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mode = draw(st.sampled_from(modes))
    shape = (num_rows, num_experts)
    bias = rng.uniform(-0.15, 0.15, num_experts) if has_bias else np.zeros(num_experts)
    if mode == "separate":
        logits = make_separate(rng, shape, bias)
    else:
        logits = make_logits(rng, mode, shape)
    num_groups = draw(st.sampled_from(divisors(num_experts))) if has_groups else 1
    router = Router(
        scoring=draw(st.sampled_from(scorings)),
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.5))),
        bias=torch.from_numpy(bias).float() if has_bias else None,
        num_groups=num_groups,
        top_groups=draw(st.integers(1, num_groups)),
    )
    dtype = torch.float32 if mode == "separate" else draw(st.sampled_from(FLOATS))
    typed = torch.from_numpy(logits.astype(np.float32)).to(dtype)
    scores, gates = router.score(typed.float())
    ids, weights = engine_choice(scores, gates, top_k, router)
    if draw(st.integers(0, 3)) == 0:  # the engine's choice is its own
        ids = torch.from_numpy(make_base(rng, scores.numpy(), top_k, is_routers=False)).int()
    return Model(typed, router, ids, weights)


@st.composite
def routed(draw: st.DrawFn, drawn: st.SearchStrategy[Model]) -> tuple[Case, Model]:
    """A model's call under a mix of policies."""
    model = draw(drawn)
    num_rows, num_experts = model.logits.shape
    kinds = ("vanilla", "topk", "oea", "oea", "sere", "budget", "budget")
    spec = spec_of(num_experts, model.top_k, kinds)
    specs = draw(st.lists(spec, min_size=1, max_size=4))
    index = st.integers(0, len(specs) - 1)
    rows = st.lists(st.none() | index | index | index, min_size=num_rows, max_size=num_rows)
    case = as_case(model, tuple(specs), tuple(draw(rows)))
    assume(not has_close_masses(case))
    return keep_off_close_demands(case, rtol=ROUTER_DEMAND_RTOL), model


seeds = st.integers(0, 2**31 - 1)


# --- every router ------------------------------------------------------------------------------


@thorough
@given(routed(models()), seeds)
def test_plain_routers(compiled: Implementation, drawn: tuple[Case, Model], seed: int) -> None:
    """Softmax, sigmoid and sqrtsoftplus of any logits: ids are exact, for they rank by logits."""
    case, model = drawn
    call = call_of(case, model, seed)
    assert_agrees(compiled(call), ask_reference(call))


@thorough
@given(routed(models(has_groups=True)), seeds)
def test_routers_with_groups(
    compiled: Implementation, drawn: tuple[Case, Model], seed: int
) -> None:
    """Only the best groups' experts and those that the engine chose count; ids are exact."""
    case, model = drawn
    call = call_of(case, model, seed)
    assert_agrees(compiled(call), ask_reference(call))


def biased_calls(scoring: str, has_groups: bool) -> st.SearchStrategy[tuple[Case, Model]]:
    """Sigmoids of any number of experts that score apart, or few rows of few experts, among which
    hardly any score alike."""
    options: dict[str, Any] = {"has_bias": True, "has_groups": has_groups, "scorings": (scoring,)}
    few = routed(models(**options, most_rows=4, most_experts=128))
    many = routed(models(**options, modes=("separate",)))
    return few | many if scoring == "sigmoid" else few


@pytest.mark.parametrize("scoring", SCORINGS)
@thorough
@given(st.data(), seeds)
def test_routers_with_a_bias(
    compiled: Implementation, scoring: str, data: st.DataObject, seed: int
) -> None:
    """The bias counts for ranking and never for weights."""
    case, model = data.draw(biased_calls(scoring, has_groups=False))
    assume(not has_close_scores(model))
    call = call_of(case, model, seed)
    assert_agrees(compiled(call), ask_reference(call))


@pytest.mark.parametrize("scoring", SCORINGS)
@thorough
@given(st.data(), seeds)
def test_routers_with_a_bias_and_groups(
    compiled: Implementation, scoring: str, data: st.DataObject, seed: int
) -> None:
    """A group is as good as its best two biased scores."""
    case, model = data.draw(biased_calls(scoring, has_groups=True))
    assume(not has_close_scores(model))
    call = call_of(case, model, seed)
    assert_agrees(compiled(call), ask_reference(call))


@pytest.mark.parametrize(
    "router",
    [Router(), Router("sigmoid", bias=torch.ones(8)), Router(num_groups=4, top_groups=2)],
    ids=["plain", "bias", "groups"],
)
def test_a_call_without_rows(compiled: Implementation, router: Router) -> None:
    """The engine makes such calls where it keeps idle processes in step."""
    none = Model(torch.empty(0, 8), router, torch.empty(0, 2).int(), torch.empty(0, 2))
    got = compiled(call_of(as_case(none, SPECS[:1], ()), none, seed=0))
    assert got.topk_ids.shape == got.topk_weights.shape == (0, 2)
    assert not got.union.any()
    assert got.statistics == [0] * 6


SPECS: tuple[Spec, ...] = (
    {"kind": "vanilla"},
    {"kind": "topk", "k0": 4},
    OEA_2,
    {**OEA_2, "k0": 5, "p": 0.41, "max_rank": 12},
    SERE_1,
    {**BUDGET_5, **MAPPED, "max_active": 40},
)


def model_of(num_rows: int, num_experts: int, router: Router, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_experts)
    if router.bias is None:
        logits = make_logits(rng, "smooth", shape)
    else:
        logits = make_separate(rng, shape, router.bias.numpy())
    typed = torch.from_numpy(logits).float()
    return Model(typed, router, *engine_choice(*router.score(typed), 8, router))


def bias_of(num_experts: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(9).uniform(-0.15, 0.15, num_experts)).float()


@pytest.mark.parametrize("num_rows", [16, 70])
@pytest.mark.parametrize(
    ("num_experts", "router"),
    [
        (128, Router()),
        (60, Router(renormalize=False)),
        (256, Router("sigmoid", True, 2.5, bias_of(256), 8, 4)),
        (160, Router("softmax", False, 16.0, None, 8, 3)),
        (384, Router("sigmoid", True, 2.827, bias_of(384))),
        (256, Router("sqrtsoftplus", True, 1.5)),
    ],
    ids=["qwen3", "qwen1.5", "deepseek-v3", "deepseek-v2", "kimi-k2", "sqrtsoftplus"],
)
def test_routers_of_known_models(
    compiled: Implementation, num_rows: int, num_experts: int, router: Router
) -> None:
    """Real sizes, in one launch and in two."""
    model = model_of(num_rows, num_experts, router, seed=2)
    rows = tuple(None if b % 7 == 3 else b % len(SPECS) for b in range(num_rows))
    case = keep_off_close_demands(as_case(model, SPECS, rows), rtol=ROUTER_DEMAND_RTOL)
    assert not has_close_masses(case)
    assert router.bias is None or not has_close_scores(model)
    call = call_of(case, model, seed=1)
    assert_agrees(compiled(call), ask_reference(call))


@brief
@given(st.sampled_from(("softmax", "sigmoid")), st.booleans(), st.integers(0, 2**32 - 1), seeds)
def test_plain_routers_give_what_the_oracle_gives(
    compiled: Implementation, scoring: Any, renormalize: bool, values: int, seed: int
) -> None:
    """Nothing of the package takes part in what is expected here."""
    logits = np.random.default_rng(values).normal(0, 2, (6, 60)).astype(np.float32)
    router = Router(scoring=scoring, renormalize=renormalize, scale=1.5)
    options: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize, "scale": 1.5}
    chosen = oracle.router(logits, 8, **options)
    ids = torch.from_numpy(chosen.ids).int()
    model = Model(torch.from_numpy(logits), router, ids, torch.from_numpy(chosen.weights).float())
    case = as_case(model, SPECS, tuple(range(6)))
    case = replace(case, scores=model.logits, gates=torch.from_numpy(chosen.gates))
    assume(not has_close_masses(case))
    case = keep_off_close_demands(case, rtol=ROUTER_DEMAND_RTOL)
    got, expected = compiled(call_of(case, model, seed)), ask_oracle(case)
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert got.union.nonzero().flatten().tolist() == expected.active
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))


def test_a_chosen_expert_counts_whatever_its_group(compiled: Implementation) -> None:
    """An engine that breaks a tie of groups otherwise keeps its choice, its rank and its gate."""
    logits = torch.full((2, 8), -1.0)
    logits[:, 0], logits[:, 5] = 3.0, 2.0  # group 0 is best, yet the engine chose 5 of group 1
    router = Router(scoring="softmax", renormalize=False, num_groups=2, top_groups=1)
    ids = torch.tensor([[5, 1], [5, 1]], dtype=torch.int32)
    model = Model(logits, router, ids, torch.tensor([[0.5, 0.25], [0.5, 0.25]]))
    case = as_case(model, ({"kind": "topk", "k0": 1}, {"kind": "vanilla"}), (0, 1))
    got = compiled(call_of(case, model, seed=0))
    gate = math.exp(2) / (math.exp(3) + math.exp(2) + 6 * math.exp(-1))
    assert got.topk_ids.tolist() == [[5, FREE], [5, 1]]
    assert got.topk_weights[0].tolist() == pytest.approx([gate, 0.0], rel=GATE_RTOL)


def test_experts_outside_the_groups_rank_behind_all_others(compiled: Implementation) -> None:
    """However good its logit, an expert of another group is no piggyback within max_rank."""
    logits = torch.tensor([[-9.0] * 6 + [2.0, 1.0], [-3.0, -4, -5, 0, -9, -9, -9, -1]])
    router = Router(num_groups=2, top_groups=1)
    ids = torch.tensor([[6, 7], [3, 0]], dtype=torch.int32)
    model = Model(logits, router, ids, torch.tensor([[0.75, 0.25], [0.75, 0.25]]))
    oea = {**OEA_2, "k0": 1, "max_rank": 5}
    got = compiled(call_of(as_case(model, ({"kind": "vanilla"}, oea), (0, 1)), model, seed=0))
    assert got.topk_ids.tolist() == [[6, 7], [3, FREE]]


def test_a_row_whose_groups_are_not_loaded_keeps_its_base(implementation: Implementation) -> None:
    """The budget goes to an expert of the other group, of which the first row may have none."""
    logits = torch.tensor([[2.0, 1.0, 0, 0, 1.5, 0, 0, 0], *[[0, 0, 0, 0, 0, 9.0, 3.0, 0]] * 2])
    router = Router(num_groups=2, top_groups=1)
    ids = torch.tensor([[1, 0], [5, 6], [5, 6]], dtype=torch.int32)
    model = Model(logits, router, ids, torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.75, 0.25]]))
    budget = {**BUDGET_5, **MAPPED, "max_active": 1}
    got = implementation(call_of(as_case(model, (budget,), (0, 0, 0)), model, seed=0))
    assert got.topk_ids.tolist() == [[1, 0], [5, FREE], [5, FREE]]
    assert got.topk_weights[0].tolist() == [0.25, 0.75]
    assert got.statistics == [1, 3, 3, 4, 2, 2]


# --- gates -------------------------------------------------------------------------------------


def gates_of(
    compiled: Implementation, logits: Tensor, scoring: Any, *, scale: float = 1.0
) -> Tensor:
    """The gates of all experts of rows of at most 16 experts, by expert id."""
    num_rows, num_experts = logits.shape
    ample = Budget.model_validate({"max_active": num_experts})
    table = build_table([ample], layer=0, top_k=num_experts, num_experts=num_experts)
    router = Router(scoring=scoring, renormalize=False, scale=scale)
    plan = torch.zeros(num_rows, dtype=torch.int32)
    ids = torch.arange(num_experts, dtype=torch.int32).repeat(num_rows, 1)
    ids[:, -1] = -1  # a choice that lacks an expert is weighed anew
    got = compiled(Call(logits, plan, table, router, ids, torch.zeros(num_rows, num_experts)))
    ids = got.topk_ids.long().clamp(min=0)  # a free slot weighs nothing
    return torch.zeros(logits.shape).scatter_add_(1, ids, got.topk_weights)


def exact_gates(logits: np.ndarray, scoring: str) -> np.ndarray:
    if scoring == "softmax":
        logits = logits - logits.max(axis=1, keepdims=True)
        gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    elif scoring == "sigmoid":
        gates = np.where(logits < 0, np.exp(logits), 1) / (1 + np.exp(-abs(logits)))
    else:
        gates = np.sqrt(np.maximum(logits, 0) + np.log1p(np.exp(-abs(logits))))
    return np.where(logits < oracle.FAINTEST, 0.0, gates)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_gates_are_those_of_float64(compiled: Implementation, scoring: str) -> None:
    """Over all magnitudes at which a gate is neither 0 nor infinite, one row of 16 a step."""
    reach = np.concatenate((np.linspace(-120, 120, 4800), np.geomspace(1e-38, 1, 400)))
    logits = np.resize(reach, (325, 16)).astype(np.float32)
    if scoring == "softmax":
        logits[:, 0] = 0.0
        logits[:, 1:] = -abs(logits[:, 1:])
    got = gates_of(compiled, torch.from_numpy(logits), scoring)
    np.testing.assert_allclose(
        got.double().numpy(),
        exact_gates(logits.astype(np.float64), scoring),
        rtol=GATE_RTOL,
        atol=0.0,
    )


INF = math.inf
NAN = math.nan


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("logits", "gates"),
    [
        ([INF, 0.0, -INF, 1.0], [1.0, 0.0, 0.0, 0.0]),
        ([INF, INF, 0.0, NAN], [0.5, 0.5, 0.0, 0.0]),
        ([-INF, -INF, -INF, -INF], [0.0, 0.0, 0.0, 0.0]),
        ([NAN, NAN, NAN, NAN], [0.0, 0.0, 0.0, 0.0]),
        ([NAN, -INF, NAN, -INF], [0.0, 0.0, 0.0, 0.0]),
        ([-INF, 2.0, NAN, 2.0], [0.0, 0.5, 0.0, 0.5]),
        ([-3e4, -3e4, -6e4, -INF], [0.5, 0.5, 0.0, 0.0]),
        ([6e-8, -6e-8, 0.0, -0.0], [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_softmax_of_extremes(
    compiled: Implementation, logits: list[float], gates: list[float], dtype: torch.dtype
) -> None:
    """Infinities take all, -inf and NaN get nothing, and a row of nothing else has no mass."""
    got = gates_of(compiled, torch.tensor([logits]).to(dtype), "softmax")
    torch.testing.assert_close(got, torch.tensor([gates]), rtol=GATE_RTOL, atol=0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("scoring", "gates"),
    [
        ("sigmoid", [1.0, 0.0, 0.0, 0.5]),
        ("sqrtsoftplus", [math.sqrt(3.402823466e38), 0.0, 0.0, math.sqrt(math.log(2))]),
    ],
)
def test_other_gates_of_extremes(
    compiled: Implementation, scoring: str, gates: list[float], dtype: torch.dtype
) -> None:
    """+inf counts as the largest number, NaN and -inf weigh nothing."""
    logits = torch.tensor([[INF, -INF, NAN, 1e-42]]).to(dtype)
    got = gates_of(compiled, logits, scoring)
    torch.testing.assert_close(got, torch.tensor([gates]), rtol=GATE_RTOL, atol=0.0)


def test_the_scale_multiplies_raw_gates(compiled: Implementation) -> None:
    """Where the model does not renormalise, weights are gates times its factor."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    once, scaled = (gates_of(compiled, logits, "sigmoid", scale=x) for x in (1.0, 2.5))
    torch.testing.assert_close(scaled, once * 2.5)
