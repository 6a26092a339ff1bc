"""MoE calls for tests: as data, drawn by hypothesis, answered by the oracle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from sglang_moe_routing.policies import (
    FREE,
    PAD,
    FreeSlots,
    Place,
    Policy,
    PolicyTable,
    Rule,
    build_table,
    builtin_registry,
)
from sglang_moe_routing.testing import oracle

Spec = dict[str, Any]

# Products and sums of at most 16 float32 numbers: a few units in the last place of 2**-23 each.
WEIGHT_RTOL = 4e-6
# 16-bit weights are rounded once more on the way out: bfloat16 to half of 2**-7, float16 to half
# of 2**-10, and below its normal numbers to half of 2**-24.
ROUNDING_RTOL = {
    torch.float64: 0,
    torch.float32: 0,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
ROUNDING_ATOL = {torch.float64: 0, torch.float32: 0, torch.bfloat16: 0, torch.float16: 2.0**-25}
# The gate mass is compared in float32 here and in float64 by the oracle; the cases keep every
# partial mass this far from p, hundreds of times what 128 float32 additions can be off.
MASS_MARGIN = 1e-5
# So much may a float32 utility be off: a sum of at most 16 gates, a quotient, a square.
DEMAND_RTOL = 4e-6
# And so much where gates are computed too: 3e-6 for a gate and for their sum, twice for the square.
ROUTER_DEMAND_RTOL = 2e-5


@dataclass(frozen=True)
class Case:
    """One MoE call: `row_specs[b]` indexes `specs`, None is a padded row."""

    scores: Tensor
    gates: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    specs: tuple[Spec, ...]
    row_specs: tuple[int | None, ...]
    artifacts: dict[str, Tensor]
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    renormalize: bool = True
    scale: float = 1.0

    @property
    def num_rows(self) -> int:
        return self.scores.shape[0]

    @property
    def num_experts(self) -> int:
        return self.scores.shape[1]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def live(self) -> list[int]:
        return [b for b, index in enumerate(self.row_specs) if index is not None]

    def spec(self, row: int) -> Spec | None:
        index = self.row_specs[row]
        return None if index is None else self.specs[index]

    def rows(self, picked: Sequence[int]) -> Case:
        """The same call with these rows, in this order."""
        index = torch.tensor(picked, dtype=torch.long)
        return replace(
            self,
            scores=self.scores[index],
            gates=self.gates[index],
            topk_ids=self.topk_ids[index],
            topk_weights=self.topk_weights[index],
            row_specs=tuple(self.row_specs[b] for b in picked),
        )


class Numbers(Policy):
    """A policy that is nothing but the numbers of its rule."""

    kind: Literal["numbers"] = "numbers"
    numbers: Rule

    @property
    def uses_similarity(self) -> bool:
        return self.numbers.uses_similarity

    def rule(self, place: Place) -> Rule:
        return self.numbers


def to_policy(spec: Spec) -> Policy:
    """The package's policy for a spec."""
    given = {name: value for name, value in spec.items() if name not in ("kind", "artifact")}
    if spec["kind"] == "rule":
        return Numbers(numbers=Rule(**given))
    return builtin_registry()[spec["kind"]].model_validate(given)


def numbers_of(spec: Spec) -> Spec:
    """The numbers of the one rule behind a spec, as the papers have them; for the oracle."""
    kind = spec["kind"]
    given = {n: value for n, value in spec.items() if value is not None and n in oracle.NOTHING}
    if kind == "sere":
        given["k0"] = spec["num_primary"]
    elif kind == "topk":
        given["k_max"] = spec["k0"]
    elif kind == "budget":
        given["exponent"] = 1 if spec["utility"] == "gate" else 2
    elif kind not in ("vanilla", "oea", "rule"):
        raise ValueError(f"unknown kind {kind!r}")
    return {**oracle.NOTHING, **given}


def table_of(case: Case) -> PolicyTable:
    return build_table(
        [to_policy(spec) for spec in case.specs],
        layer=0,
        top_k=case.top_k,
        num_experts=case.num_experts,
        similarity=case.artifacts,
        coefficients=case.coefficients,
        artifacts=[spec.get("artifact") for spec in case.specs],
    )


def policy_ids(case: Case, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([PAD if i is None else i for i in case.row_specs], dtype=dtype)


def ask_oracle(case: Case, *, repeats_first: bool = False) -> oracle.Routed:
    rules: list[Spec | None] = []
    for row in range(case.num_rows):
        spec = case.spec(row)
        if spec is None:
            rules.append(None)
            continue
        artifact = spec.get("artifact")
        matrices = {"similarity": case.artifacts, "coefficients": case.coefficients}
        given = {n: m[artifact].float().numpy() for n, m in matrices.items() if artifact in m}
        rules.append({**numbers_of(spec), **given})
    return oracle.reroute(
        case.scores.float().numpy(),
        case.gates.numpy(),
        case.topk_ids.numpy(),
        case.topk_weights.double().numpy(),
        rules,
        renormalize=case.renormalize,
        scale=case.scale,
        repeats_first=repeats_first,
    )


def bits(tensor: Tensor) -> Tensor:
    """The raw bits of a float tensor, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert torch.equal(bits(left.contiguous()), bits(right.contiguous()))


def assert_close(weights: Tensor, expected: Tensor) -> None:
    """Equal but for rounding; if both were rounded to 16 bits, they may be a whole unit apart."""
    dtypes = (weights.dtype, expected.dtype)
    torch.testing.assert_close(
        weights.double(),
        expected.double(),
        rtol=WEIGHT_RTOL + sum(ROUNDING_RTOL[dtype] for dtype in dtypes),
        atol=1e-30 + sum(ROUNDING_ATOL[dtype] for dtype in dtypes),
        equal_nan=True,
    )


def assert_distinct_experts(
    ids: Sequence[int], weights: Sequence[float], num_experts: int, free_slots: FreeSlots
) -> None:
    """One row after re-routing: its first slot holds an expert, no other slot holds an expert that
    an earlier one holds, and the rest is free."""
    held = list(dict.fromkeys(j for j in ids if j != FREE))
    assert held[0] == ids[0]
    assert all(0 <= j < num_experts for j in held)
    free_id = FREE if free_slots is FreeSlots.IGNORED else ids[0]
    for t, j in enumerate(ids):
        if j == FREE or j in ids[:t]:
            assert (j, weights[t]) == (free_id, 0.0)


# --- cases -------------------------------------------------------------------------------------

THRESHOLDS = (-0.75, 0.0, 0.25, 0.3, 0.5, 1.0, 1.5)


@st.composite
def spec_of(draw: st.DrawFn, num_experts: int, top_k: int, kinds: Sequence[str]) -> Spec:
    """One policy of one of `kinds`, with every parameter that it has.

    A `max_rank` far beyond the base hardly ever decides, so small ones are drawn.
    """
    kind = draw(st.sampled_from(kinds))
    count = st.integers(1, top_k)
    if kind == "vanilla":
        return {"kind": kind}
    compensation: Spec = {"compensation": draw(st.sampled_from((None, None, 0.0, 0.4, 0.6, 1.0)))}
    if kind == "topk":
        return {"kind": kind, "k0": draw(count), **compensation}
    artifact = draw(st.sampled_from(("a", "b")))
    if kind == "sere":
        threshold = draw(st.sampled_from(THRESHOLDS))
        moving = {"num_primary": draw(count), "threshold": threshold, "artifact": artifact}
        return {"kind": kind, **moving, **compensation}
    mapping = {"mapped_share": draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))), "artifact": artifact}
    few = st.integers(1, min(num_experts, 4 * top_k))
    max_active = draw(few | st.integers(1, num_experts))
    limits: Spec = {
        "p": draw(st.sampled_from((1.0, 1.0, 0.9, 0.7, 0.5, 0.3, 0.05))),
        "k_max": draw(st.none() | count),
        "max_rank": draw(st.none() | st.integers(1, min(num_experts, top_k + 4))),
    }
    fewest = draw(st.just(0) | st.integers(0, top_k))
    if kind == "rule":
        return draw_numbers(draw, {"k0": fewest, **limits}, max_active, {**mapping, **compensation})
    if kind == "budget":
        return {
            "kind": kind,
            "max_active": max_active,
            "k0": fewest,
            "utility": draw(st.sampled_from(("squared_gate", "gate"))),
            **mapping,
            **compensation,
        }
    return {**mapping, **compensation, "kind": kind, "k0": draw(count), **limits}


def draw_numbers(draw: st.DrawFn, required: Spec, max_active: int, weights: Spec) -> Spec:
    """A rule of any numbers that go together. What is None has no limit."""
    filling = {
        "max_active": draw(st.sampled_from((0, max_active))),
        "exponent": draw(st.sampled_from((0, 1, 2))),
    }
    spec = {"kind": "rule", **required, **filling, **weights}
    if draw(st.booleans()):
        moving = {"threshold": draw(st.sampled_from(THRESHOLDS)), "k_max": None, "max_rank": None}
        spec = {**spec, **moving, "mapped_share": 0.0}
    return {name: value for name, value in spec.items() if value is not None}


def make_scores(rng: np.random.Generator, mode: str, shape: tuple[int, int]) -> np.ndarray:
    if mode == "smooth":
        scores = rng.standard_normal(shape)
    else:
        few = (-1.0, -0.0, 0.0, 0.5, 2.0)
        subnormal = (1e-42, -1e-42, 1e-40, 6e-8)  # in float32, bfloat16 and float16
        special = (*few, np.nan, np.inf, -np.inf, 1e30, *subnormal)
        scores = rng.choice(few if mode == "ties" else special, shape)
    return np.asarray(scores, dtype=np.float32)


def make_gates(rng: np.random.Generator, mode: str, scores: np.ndarray) -> np.ndarray:
    if mode == "softmax":
        finite = np.nan_to_num(scores.astype(np.float64), nan=-9.0).clip(-9.0, 9.0)
        gates = np.exp(finite) / np.exp(finite).sum(axis=1, keepdims=True)
    elif mode == "uniform":
        gates = rng.random(scores.shape)
    else:
        gates = rng.choice((0.0, 0.0, 0.25, 1.0, 1e-12, np.nan), scores.shape)
    return np.asarray(gates, dtype=np.float32)


def make_base(
    rng: np.random.Generator, scores: np.ndarray, top_k: int, is_routers: bool
) -> np.ndarray:
    """Distinct ids in shuffled column order: the best by rank, or any (the engine's word)."""
    rows = []
    for row in scores:
        everyone = np.arange(len(row))
        best = np.lexsort((everyone, -row, np.isnan(row)))  # the last key counts first
        best = best if is_routers else rng.permutation(everyone)
        rows.append(rng.permutation(best[:top_k]))
    return np.array(rows, dtype=np.int64).reshape(len(scores), top_k)


def make_artifact(rng: np.random.Generator, mode: str, num_experts: int) -> Tensor:
    size = (num_experts, num_experts)
    if mode == "ties":
        return torch.from_numpy(rng.integers(-4, 9, size) / 8).float()
    matrix = torch.from_numpy(rng.uniform(-1, 1, size))
    return matrix.half() if mode == "half" else matrix.float()


def make_coefficients(rng: np.random.Generator, num_experts: int) -> Tensor:
    return torch.from_numpy(rng.uniform(0, 1, (num_experts, num_experts))).half()


def first_ranks(case: Case, row: int) -> list[int]:
    """The row's first top_k experts in rank order. Ids may be out of range or repeated."""
    valid = [j for j in case.topk_ids[row].tolist() if 0 <= j < case.num_experts]
    return oracle.rank_order(case.scores[row].tolist(), list(dict.fromkeys(valid)))[: case.top_k]


def keep_off_thresholds(case: Case) -> Case:
    """Move each p < 1 until no row's partial gate mass is close enough to it to be a matter of
    rounding. Then `keep_off_close_demands`."""
    specs = [dict(spec) for spec in case.specs]
    for index, spec in enumerate(specs):
        if spec.get("p", 1.0) >= 1.0:
            continue
        shares: list[float] = []
        for row in case.live:
            if case.row_specs[row] != index:
                continue
            shares += oracle.mass_prefixes(case.gates[row].tolist(), first_ranks(case, row))
        while any(abs(share - spec["p"]) < MASS_MARGIN for share in shares):
            spec["p"] -= 3 * MASS_MARGIN
    return keep_off_close_demands(replace(case, specs=tuple(specs)))


def keep_off_close_demands(case: Case, rtol: float = DEMAND_RTOL) -> Case:
    """Raise the largest max_active of the live budget rows until the last expert that it lets in
    and the first that it leaves out are not told apart by rounding. Equal demands stay."""
    live = {case.row_specs[b] for b in case.live}
    budgets = [
        index for index, spec in enumerate(case.specs) if index in live and _asks(spec, case.top_k)
    ]
    if not budgets:
        return case
    most = max(budgets, key=lambda index: int(case.specs[index]["max_active"]))
    wanted = safe_max_active(case, case.specs[most]["max_active"], rtol)
    specs = list(case.specs)
    specs[most] = {**specs[most], "max_active": wanted}
    return replace(case, specs=tuple(specs))


def _asks(spec: Spec, top_k: int) -> bool:
    """Whether rows of this policy demand experts."""
    return bool(numbers_of(spec)["max_active"]) and not oracle.keeps_base(numbers_of(spec), top_k)


def safe_max_active(case: Case, wanted: int, rtol: float) -> int:
    """The smallest max_active from `wanted` on under which rounding does not decide who joins U."""
    least, most = np.zeros((2, case.num_experts), dtype=np.int64)
    order = rank_rows(case)
    for row in case.live:
        spec, base = case.spec(row) or {}, order[row, : case.top_k].tolist()
        gates = case.gates[row].nan_to_num(nan=0.0).double().numpy()
        if not spec or not _asks(spec, case.top_k) or not gates[base].sum() > 0:
            continue
        shares = gates[base] / gates[base].sum()
        quanta = 65536 * shares ** numbers_of(spec)["exponent"]
        for bound, factor in ((least, 1 - rtol), (most, 1 + rtol)):
            bound[base] += np.where(shares > 0, (quanta * factor + 0.5).clip(1), 0).astype(int)
    candidates = [j for j in range(case.num_experts) if most[j] > 0]
    candidates.sort(key=lambda j: (-least[j], j))
    while 0 < wanted < len(candidates):
        last, next_best = candidates[:wanted], candidates[wanted:]
        if min((least[j], -j) for j in last) > max((most[j], -j) for j in next_best):
            break
        wanted += 1
    return wanted


def rank_rows(case: Case) -> np.ndarray:
    """Every row's experts in rank order, as `oracle.rank_order` has them, all rows at once."""
    ids = case.topk_ids.long().numpy()
    is_valid = (ids >= 0) & (ids < case.num_experts)
    is_base = np.zeros((case.num_rows, case.num_experts + 1), dtype=bool)
    np.put_along_axis(is_base, np.where(is_valid, ids, case.num_experts), True, axis=1)
    scores = case.scores.float().numpy()
    is_nan = np.isnan(scores)
    falling = np.where(is_nan, 0.0, -scores)
    return np.asarray(np.lexsort((falling, is_nan, ~is_base[:, :-1]), axis=1))  # last key first


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL_KINDS = ("vanilla", "topk", "oea", "sere", "budget", "rule")


Shape = tuple[int, int, int]
"""Rows, experts, experts per token."""


@st.composite
def small_shapes(draw: st.DrawFn) -> Shape:
    """Sizes at which the oracle is quick."""
    num_experts = draw(st.integers(2, 40) | st.integers(2, 40) | st.just(128))
    return draw(st.integers(0, 12)), num_experts, draw(st.integers(1, min(num_experts, 8)))


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: Sequence[str] = ALL_KINDS,
    min_rows: int = 0,
    min_live: int = 0,
    shapes: st.SearchStrategy[Shape] | None = None,
    score_types: Sequence[torch.dtype] = (torch.float32,),
    weight_types: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Case:
    """A whole MoE call; sizes, modes and policies are drawn, values come from a drawn seed."""
    num_rows, num_experts, top_k = draw(shapes if shapes is not None else small_shapes())
    num_rows = max(num_rows, min_rows, min_live)
    specs = draw(st.lists(spec_of(num_experts, top_k, kinds), min_size=1, max_size=5))
    index = st.integers(0, len(specs) - 1)
    row_specs = draw(
        st.lists(st.none() | index | index, min_size=num_rows, max_size=num_rows).filter(
            lambda drawn: sum(i is not None for i in drawn) >= min_live
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mode = draw(st.sampled_from(("smooth", "ties", "special")))
    drawn_scores = torch.from_numpy(make_scores(rng, mode, (num_rows, num_experts)))
    typed_scores = drawn_scores.to(draw(st.sampled_from(score_types)))
    scores = typed_scores.float().numpy()  # what everyone sees, oracle included
    gates = make_gates(rng, draw(st.sampled_from(("softmax", "uniform", "holes"))), scores)
    base = make_base(rng, scores, top_k, is_routers=draw(st.booleans()))
    weights = torch.from_numpy(rng.uniform(0.01, 1.0, (num_rows, top_k)))
    similarity = draw(st.sampled_from(("ties", "half", "smooth")))
    artifacts = {name: make_artifact(rng, similarity, num_experts) for name in ("a", "b")}
    with_coefficients = draw(st.sampled_from(("", "a", "b", "ab")))
    return keep_off_thresholds(
        Case(
            scores=typed_scores,
            gates=torch.from_numpy(gates),
            topk_ids=torch.from_numpy(base).to(draw(st.sampled_from((torch.int32, torch.int64)))),
            topk_weights=weights.to(draw(st.sampled_from(weight_types))),
            specs=tuple(specs),
            row_specs=tuple(row_specs),
            artifacts=artifacts,
            coefficients={name: make_coefficients(rng, num_experts) for name in with_coefficients},
            renormalize=draw(st.booleans()),
            scale=draw(st.sampled_from((1.0, 2.5))),
        )
    )


def small_case(
    specs: Sequence[Spec],
    row_specs: Sequence[int | None],
    *,
    num_experts: int = 9,
    top_k: int = 3,
    seed: int = 0,
) -> Case:
    """A smooth call for tests that need no search."""
    rng = np.random.default_rng(seed)
    scores = make_scores(rng, "smooth", (len(row_specs), num_experts))
    return Case(
        scores=torch.from_numpy(scores),
        gates=torch.from_numpy(make_gates(rng, "softmax", scores)),
        topk_ids=torch.from_numpy(make_base(rng, scores, top_k, is_routers=True)),
        topk_weights=torch.from_numpy(rng.uniform(0.1, 1, (len(row_specs), top_k))).float(),
        specs=tuple(specs),
        row_specs=tuple(row_specs),
        artifacts={name: make_artifact(rng, "smooth", num_experts) for name in ("a", "b")},
    )


OEA_2: Spec = {"kind": "oea", "k0": 2, "p": 1.0, "k_max": None, "max_rank": None}
SERE_1: Spec = {"kind": "sere", "num_primary": 1, "threshold": 0.0, "artifact": "b"}
BUDGET_5: Spec = {"kind": "budget", "max_active": 5, "k0": 0, "utility": "squared_gate"}
MAPPED: Spec = {"mapped_share": 0.3, "artifact": "a"}
ONE_OF_EACH: tuple[Spec, ...] = (
    {"kind": "vanilla"},
    {"kind": "topk", "k0": 2},
    OEA_2,
    {"kind": "oea", "k0": 3, "p": 0.5, "k_max": 2, "max_rank": 6},
    SERE_1,
    BUDGET_5,
)


def varied_case(shape: Shape, seed: int, specs: tuple[Spec, ...] | None = None) -> Case:
    """A case that is too big to be drawn by hypothesis; rows under one of each kind, or `specs`."""
    rng = np.random.default_rng(seed)
    num_rows, num_experts, top_k = shape
    mode = ("smooth", "ties", "special")[seed % 3]
    scores = torch.from_numpy(make_scores(rng, mode, (num_rows, num_experts)))
    scores = scores.to(FLOATS[(seed + num_rows) % 3])
    seen = scores.float().numpy()
    specs = specs or (
        {"kind": "vanilla"},
        {"kind": "topk", "k0": max(1, top_k - 1)},
        {**OEA_2, "k0": (top_k + 1) // 2},
        {**OEA_2, "k0": top_k, "p": 0.6, "max_rank": min(num_experts, 2 * top_k)},
        SERE_1,
        {**SERE_1, "num_primary": (top_k + 1) // 2, "threshold": 0.9, "artifact": "a"},
        {**OEA_2, **MAPPED, "k0": max(1, top_k // 4)},
        {**BUDGET_5, **MAPPED, "max_active": (num_experts + 1) // 2},
        {**OEA_2, "k0": max(1, top_k // 2), "compensation": 0.6},
        {**SERE_1, "compensation": 0.4},
        {"kind": "rule", "k0": 0, "exponent": 0, "max_active": top_k + 1, "max_rank": top_k},
    )
    drawn = rng.integers(-1, len(specs), num_rows).tolist()
    return keep_off_thresholds(
        Case(
            scores=scores,
            gates=torch.from_numpy(make_gates(rng, ("softmax", "holes")[seed % 2], seen)),
            topk_ids=torch.from_numpy(make_base(rng, seen, top_k, is_routers=seed % 2 == 0)).int(),
            topk_weights=torch.from_numpy(rng.uniform(0.01, 1, (num_rows, top_k))).float(),
            specs=specs,
            row_specs=tuple(None if index < 0 else index for index in drawn),
            artifacts={name: make_artifact(rng, "smooth", num_experts) for name in ("a", "b")},
            coefficients={"a": make_coefficients(rng, num_experts)} if seed % 3 == 0 else {},
            renormalize=seed % 2 == 0,
            scale=2.5,
        )
    )


def examples(number: int) -> int:
    """How many random calls a property is held to: half of them, or what the variable says.

    A run of all tests has six implementations to go through; `make kernels` takes all.
    """
    percent = int(os.environ.get("MOE_ROUTING_TEST_EXAMPLES", "50"))
    return max(1, number * percent // 100)
