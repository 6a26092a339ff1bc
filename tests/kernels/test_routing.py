"""Every implementation of the re-routing against the oracle, and the promises of the semantics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_moe_routing import kernels
from sglang_moe_routing.kernels import native
from sglang_moe_routing.policies import (
    FREE,
    PAD,
    Engagement,
    FreeSlots,
    Policy,
    PolicyTable,
    Router,
    build_table,
)
from sglang_moe_routing.policies.schedule import CountSchedule
from sglang_moe_routing.testing import oracle
from tests.cases import (
    BUDGET_5,
    FLOATS,
    MAPPED,
    OEA_2,
    ONE_OF_EACH,
    SERE_1,
    Case,
    Shape,
    Spec,
    ask_oracle,
    assert_close,
    assert_distinct_experts,
    assert_same_bits,
    bits,
    cases,
    examples,
    keep_off_close_demands,
    keep_off_thresholds,
    make_scores,
    numbers_of,
    policy_ids,
    table_of,
    to_policy,
    varied_case,
)
from tests.kernels.conftest import (
    Call,
    Implementation,
    ask_reference,
    assert_agrees,
    call_of,
)
from tests.kernels.driver import Outcome, apart

NUM_EXPERTS = (1, 7, 8, 60, 64, 72, 128, 160, 256, 512, 896, 1024)
MAX_TOP_K = 32

thorough = settings(max_examples=examples(120), deadline=None, database=None)
brief = settings(max_examples=examples(40), deadline=None, database=None)


@st.composite
def shapes(draw: st.DrawFn, most_rows: int = 24) -> Shape:
    """The sizes of real models and around the limits of warps; few rows where there are many
    experts, because the oracle is slow."""
    num_experts = draw(st.sampled_from(NUM_EXPERTS))
    rows = st.integers(0, most_rows if num_experts <= 128 else most_rows // 4)
    return draw(rows), num_experts, draw(st.integers(1, min(num_experts, MAX_TOP_K)))


def any_cases(**options: Any) -> st.SearchStrategy[Case]:
    options = {"shapes": shapes(), "score_types": FLOATS, "weight_types": FLOATS, **options}
    return cases(**options)


seeds = st.integers(0, 2**31 - 1)
free_slot_ids = st.sampled_from(FreeSlots)


def statistics_of(case: Case, expected: oracle.Routed) -> list[int]:
    """Calls, rows, active, active_base, moved slots, critical, from the oracle's answer."""
    base, final = case.topk_ids.tolist(), expected.ids.tolist()
    moved = [j for b in case.live for j in base[b] if j not in final[b]]
    touched = {j for b in case.live for j in final[b] if j != FREE}
    num_critical = len(touched - set(expected.active))
    sizes = [expected.distinct, expected.distinct_base, len(moved), num_critical]
    return [int(len(case.live) > 0), len(case.live), *sizes]


def assert_as_oracle(got: Outcome, case: Case, free_slots: FreeSlots = FreeSlots.IGNORED) -> None:
    expected = ask_oracle(case, repeats_first=free_slots is FreeSlots.REPEAT_FIRST)
    assert got.topk_ids.dtype == case.topk_ids.dtype
    assert got.topk_weights.dtype == case.topk_weights.dtype
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert got.union.nonzero().flatten().tolist() == expected.active
    assert got.statistics == statistics_of(case, expected)
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))


def assert_same(got: Outcome, expected: Outcome) -> None:
    """Two runs of one implementation: not one bit differs."""
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert_same_bits(got.topk_weights, expected.topk_weights)
    assert torch.equal(got.union, expected.union)
    assert got.statistics == expected.statistics


# --- against the oracle ------------------------------------------------------------------------


@thorough
@given(any_cases(), free_slot_ids, seeds)
def test_any_mix_of_policies_gives_what_the_oracle_gives(
    implementation: Implementation, case: Case, free_slots: FreeSlots, seed: int
) -> None:
    """Ids, weights, U and all statistics equal those of the slow loops, for every size and type,
    with ties, NaN, infinities and subnormals, wherever padded rows lie."""
    call = replace(call_of(case, seed=seed), free_slots=free_slots)
    assert_as_oracle(implementation(call), case, free_slots)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape",
    [
        (16, 256, 8),
        (17, 128, 8),
        (33, 60, 4),
        (65, 512, 22),
        (18, 1024, 32),
        (130, 128, 6),
        (513, 128, 8),
        (1100, 8, 2),
    ],
    ids=str,
)
def test_many_rows_give_what_the_oracle_gives(
    implementation: Implementation, shape: Shape, seed: int
) -> None:
    """More rows than warps in a block, than rows in a launch, than warps in a grid."""
    case = varied_case(shape, seed)
    assert_as_oracle(implementation(call_of(case, seed=seed)), case)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "max_active"),
    [
        ((1, 64, 8), 5),
        ((16, 128, 8), 40),
        ((17, 512, 8), 70),
        ((40, 60, 4), 30),
        ((200, 256, 8), 100),
        ((1100, 64, 6), 33),
    ],
    ids=str,
)
def test_many_budget_rows_give_what_the_oracle_gives(
    implementation: Implementation, shape: Shape, max_active: int, seed: int
) -> None:
    """Demand decides where no other policy requires everything, in one block and over many."""
    budget = {**BUDGET_5, "max_active": max_active}
    by_gate = {**budget, **MAPPED, "max_active": max_active - 1, "utility": "gate"}
    case = varied_case(shape, seed, (budget, by_gate))
    assert_as_oracle(implementation(call_of(case, seed=seed)), case)


# --- schedules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one policy does at which number of live rows: off outside [min_rows, max_rows], and
    `counts[start]` experts from `start` live rows on in place of the policy's own number."""

    min_rows: int
    max_rows: int | None
    counts: dict[int, int]

    def spec(self, spec: Spec, num_live: int) -> Spec:
        """The policy that holds for this number of live rows."""
        if num_live < self.min_rows or (self.max_rows is not None and num_live > self.max_rows):
            return {"kind": "vanilla"}
        reached = [start for start in self.counts if start <= num_live]
        name = COUNT_NAMES.get(spec["kind"])
        if not reached or name is None:
            return spec
        return {**spec, name: self.counts[max(reached)]}

    def policy(self, spec: Spec) -> Policy:
        policy = to_policy(spec)
        changes: dict[str, Any] = {
            "engage": Engagement(min_rows=self.min_rows, max_rows=self.max_rows)
        }
        name = COUNT_NAMES.get(spec["kind"])
        if name is not None:
            changes[name] = CountSchedule(default=spec[name], rows=self.counts)
        return policy.model_copy(update=changes)


COUNT_NAMES = {"topk": "k0", "oea": "k0", "sere": "num_primary"}
"""The number that a schedule changes."""


@st.composite
def plans(draw: st.DrawFn, top_k: int, most_rows: int) -> Plan:
    starts = st.integers(1, most_rows)
    min_rows = draw(st.just(1) | starts)
    return Plan(
        min_rows=min_rows,
        max_rows=draw(st.none() | st.integers(min_rows, most_rows + 1)),
        counts=draw(st.dictionaries(starts, st.integers(1, top_k), max_size=3)),
    )


def scheduled(case: Case, planned: Sequence[Plan]) -> tuple[Case, PolicyTable]:
    """The case that holds for its number of live rows, and the table for every number."""
    pairs = list(zip(planned, case.specs, strict=True))
    specs = tuple(plan.spec(spec, len(case.live)) for plan, spec in pairs)
    now = keep_off_close_demands(replace(case, specs=specs))
    pairs = [
        (plan, new if new["kind"] == "budget" else old)
        for (plan, old), new in zip(pairs, now.specs, strict=True)
    ]
    table = build_table(
        [plan.policy(spec) for plan, spec in pairs],
        layer=0,
        top_k=case.top_k,
        num_experts=case.num_experts,
        similarity=case.artifacts,
        coefficients=case.coefficients,
        artifacts=[spec.get("artifact") for spec in case.specs],
    )
    return now, table


@thorough
@given(any_cases(), st.data())
def test_policies_follow_the_number_of_live_rows(
    implementation: Implementation, case: Case, data: st.DataObject
) -> None:
    """Steps and engagement go by live rows, not by all rows, and hold from their start on."""
    plan = plans(case.top_k, max(case.num_rows, 1))
    size = len(case.specs)
    case, table = scheduled(case, data.draw(st.lists(plan, min_size=size, max_size=size)))
    assert_as_oracle(implementation(call_of(case, seed=data.draw(seeds), table=table)), case)


@pytest.mark.parametrize("num_live", [1, 2, 3])
def test_the_budget_follows_the_number_of_live_rows(
    implementation: Implementation, num_live: int
) -> None:
    """A max_active that changes at 2 live rows changes at 2."""
    budget = to_policy({**BUDGET_5, "max_active": 2})
    scheduled = budget.model_copy(update={"max_active": CountSchedule(default=2, rows={2: 4})})
    table = build_table([scheduled], layer=0, top_k=3, num_experts=9)
    case = varied_case((num_live, 9, 3), seed=0, specs=(BUDGET_5,))
    case = replace(case, row_specs=(0,) * num_live)
    got = implementation(call_of(case, table=table))
    assert got.union.sum() == (2 if num_live < 2 else 4)


@pytest.mark.parametrize("num_live", [1, 69, 70, 71, 100])
def test_many_rows_are_counted_when_steps_are_chosen(
    implementation: Implementation, num_live: int
) -> None:
    """Beyond one block too, the step that starts at 70 live rows starts at 70."""
    case = varied_case((100, 60, 6), seed=0)
    padded = np.random.default_rng(num_live).permutation(100)[: 100 - num_live].tolist()
    rows = tuple(None if b in padded else (i or 0) for b, i in enumerate(case.row_specs))
    planned = [Plan(min_rows=1, max_rows=None, counts={70: 1, 71: 2})] * len(case.specs)
    case, table = scheduled(replace(case, row_specs=rows), planned)
    assert_as_oracle(implementation(call_of(case, table=table)), case)


# --- memory ------------------------------------------------------------------------------------


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous().T


def test_layouts_are_what_they_say() -> None:
    """The two ways to lay a matrix out that the tests below rely on."""
    matrix = torch.arange(6).view(2, 3)
    assert apart(matrix, 4).stride() == (7, 1)
    assert transposed(matrix).stride() == (1, 2)
    assert torch.equal(apart(matrix, 4), matrix)


@brief
@given(any_cases(), st.sampled_from((lambda x: apart(x, 1), lambda x: apart(x, 5), transposed)))
def test_inputs_may_be_non_contiguous(
    compiled: Implementation, case: Case, layout: Callable[[Tensor], Tensor]
) -> None:
    """Rows that lie apart, or matrices that lie transposed, give what contiguous ones give."""
    call = call_of(case)
    assert_same(compiled(call.laid_out(layout)), compiled(call))


@brief
@given(any_cases(), st.integers(1, 5))
def test_outputs_may_be_part_of_wider_tensors(
    compiled: Implementation, case: Case, gap: int
) -> None:
    """The same outcome, and nothing beside the rows of the outputs is written."""
    call = call_of(case)
    assert_same(compiled(call, out_gap=gap), compiled(call))


@brief
@given(any_cases(), st.integers(0, 3), seeds)
def test_outputs_may_be_the_inputs(
    compiled: Implementation, case: Case, gap: int, seed: int
) -> None:
    """In place the outcome is the same, also where the rows lie apart."""
    call = call_of(case, seed=seed)
    assert_same(compiled(call.laid_out(lambda x: apart(x, gap)), in_place=True), compiled(call))


@pytest.mark.parametrize("num_rows", [17, 130])
def test_many_rows_may_be_routed_in_place(compiled: Implementation, num_rows: int) -> None:
    """In place beyond one block, where the choice is read by two launches."""
    call = call_of(varied_case((num_rows, 64, 6), seed=1), seed=1)
    assert_same(compiled(call, in_place=True), compiled(call))


# --- odd input ---------------------------------------------------------------------------------


def with_garbage(case: Case, seed: int) -> Case:
    """Ids out of range and ids twice, in some slots or in all."""
    rng = np.random.default_rng(seed)
    n = case.num_experts
    noise = [-1, n, 2**31 - 1, -(2**31), 0, n - 1, n // 2]
    if case.topk_ids.dtype == torch.int64:
        noise += [2**63 - 1, -(2**63), 2**32, 2**32 + 1]
    shape = tuple(case.topk_ids.shape)
    garbage = torch.from_numpy(rng.choice(np.array(noise), shape)).to(case.topk_ids.dtype)
    hit = torch.from_numpy(rng.random(shape) < rng.choice((0.3, 1.0)))
    bad = replace(case, topk_ids=torch.where(hit, garbage, case.topk_ids))
    return keep_off_thresholds(bad)


@thorough
@given(any_cases(), st.integers(0, 2**32 - 1), free_slot_ids, seeds)
def test_ids_out_of_range_or_repeated_are_handled_as_by_the_reference(
    compiled: Implementation, case: Case, noise: int, free_slots: FreeSlots, seed: int
) -> None:
    """A broken choice gives what the reference makes of it; re-routed rows hold valid ids, each
    once."""
    bad = with_garbage(case, noise)
    call = replace(call_of(bad, seed=seed), free_slots=free_slots)
    got = compiled(call)
    assert_agrees(got, ask_reference(call))
    for row, ids in enumerate(got.topk_ids.tolist()):
        spec = bad.spec(row)
        if spec is not None and not oracle.keeps_base(numbers_of(spec), bad.top_k):
            weights = got.topk_weights[row].tolist()
            assert_distinct_experts(ids, weights, bad.num_experts, free_slots)


@brief
@given(any_cases(min_rows=1), st.data())
def test_policies_that_the_table_lacks_are_vanilla(
    compiled: Implementation, case: Case, data: st.DataObject
) -> None:
    """A policy id outside the table is a live row that is left alone."""
    size = len(case.specs)
    case = replace(case, specs=(*case.specs, {"kind": "vanilla"}))
    rows = data.draw(st.lists(st.integers(0, case.num_rows - 1), min_size=1, max_size=4))
    unknown = st.sampled_from((size, size + 5, 2**31 - 1, -2, -(2**31)))
    known = replace(
        case, row_specs=tuple(size if b in rows else i for b, i in enumerate(case.row_specs))
    )
    plan = policy_ids(case, torch.int32)
    for row in rows:
        plan[row] = data.draw(unknown)
    table = table_of(replace(case, specs=case.specs[:-1]))
    got = compiled(replace(call_of(known), policy_ids=plan, table=table))
    assert_same(got, compiled(call_of(known)))


@pytest.mark.parametrize(
    ("free_slots", "expert"), [(FreeSlots.IGNORED, FREE), (FreeSlots.REPEAT_FIRST, 0)]
)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 70])
def test_a_call_of_padding_alone_is_free_in_every_slot(
    implementation: Implementation, num_rows: int, free_slots: FreeSlots, expert: int
) -> None:
    """Without a live row nothing is required, active or counted."""
    case = varied_case((num_rows, 9, 3), seed=2)
    case = replace(case, row_specs=(None,) * num_rows)
    got = implementation(replace(call_of(case), free_slots=free_slots))
    assert got.topk_ids.tolist() == [[expert] * 3] * num_rows
    assert got.topk_weights.tolist() == [[0.0, 0.0, 0.0]] * num_rows
    assert not got.union.any()
    assert got.statistics == [0] * 6


# --- promises ----------------------------------------------------------------------------------

ODD_BITS = {
    torch.float32: (0x7FC01234, 0x7F800001, -(2**31), 0x7F800000, 1),
    torch.bfloat16: (0x7FC1, 0x7F81, -(2**15), 0x7F80, 1),
    torch.float16: (0x7E01, 0x7C01, -(2**15), 0x7C00, 1),
}
"""NaN with a payload, signalling NaN, -0.0, infinity, the smallest subnormal."""


@brief
@given(any_cases(kinds=("vanilla", "vanilla", "oea", "sere", "budget")), st.integers(0, 2**32 - 1))
def test_vanilla_rows_pass_bit_for_bit(compiled: Implementation, case: Case, seed: int) -> None:
    """A vanilla row leaves with the very bits it came with, odd weights and ids included."""
    rng = np.random.default_rng(seed)
    raw = bits(case.topk_weights).clone()
    ids = case.topk_ids.clone()
    vanilla = [b for b in case.live if case.spec(b) == {"kind": "vanilla"}]
    for row in vanilla:
        raw[row] = torch.from_numpy(rng.choice(ODD_BITS[case.topk_weights.dtype], case.top_k))
        ids[row, rng.integers(case.top_k)] = int(rng.choice((-1, 2**31 - 1)))
    odd = replace(case, topk_ids=ids, topk_weights=raw.view(case.topk_weights.dtype))
    got = compiled(call_of(odd))
    assert torch.equal(got.topk_ids[vanilla], ids[vanilla])
    assert_same_bits(got.topk_weights[vanilla], odd.topk_weights[vanilla])


@brief
@given(any_cases(min_live=1), st.sampled_from(("topk", "oea", "sere", "budget")))
def test_keeping_all_k_experts_is_vanilla(compiled: Implementation, case: Case, kind: str) -> None:
    """k0 = k or S = k leaves every live row bit for bit, in the engine's column order."""
    k = case.top_k
    full: dict[str, Spec] = {
        "topk": {"kind": "topk", "k0": k},
        "oea": {**OEA_2, "k0": k},
        "sere": {**SERE_1, "num_primary": k, "threshold": -1.0},
        "budget": {**BUDGET_5, **MAPPED, "max_active": 1, "k0": k},
    }
    rows = tuple(None if i is None else 0 for i in case.row_specs)
    case = replace(case, specs=(full[kind],), row_specs=rows)
    got = compiled(call_of(case))
    assert torch.equal(got.topk_ids[case.live], case.topk_ids[case.live])
    assert_same_bits(got.topk_weights[case.live], case.topk_weights[case.live])


@brief
@given(any_cases(), seeds)
def test_rerouting_never_adds_active_experts(
    compiled: Implementation, case: Case, seed: int
) -> None:
    """T <= T_base, and every final expert is in U or was in the row's own base."""
    got = compiled(call_of(case, seed=seed))
    assert got.statistics[2] <= got.statistics[3]
    union = set(got.union.nonzero().flatten().tolist())
    for row in case.live:
        assert set(got.topk_ids[row].tolist()) <= union | {*case.topk_ids[row].tolist(), FREE}


@thorough
@given(any_cases(), free_slot_ids, seeds)
def test_every_row_holds_distinct_experts(
    implementation: Implementation, case: Case, free_slots: FreeSlots, seed: int
) -> None:
    """Whatever its policy, no live row holds an expert twice; slots without one are free."""
    got = implementation(replace(call_of(case, seed=seed), free_slots=free_slots))
    for row in case.live:
        ids, weights = got.topk_ids[row].tolist(), got.topk_weights[row].tolist()
        assert_distinct_experts(ids, weights, case.num_experts, free_slots)


@brief
@given(any_cases(kinds=("sere", "topk"), weight_types=(torch.float32,)), seeds)
def test_merged_slots_keep_the_sum_of_a_row(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """A row under sere weighs what it came with, however many of its slots end on one expert."""
    case = with_every(case, compensation=1.0)
    got = implementation(call_of(case, seed=seed))
    rows = [b for b in case.live if case.specs[case.row_specs[b] or 0]["kind"] == "sere"]
    before, after = (x[rows].sum(dim=1) for x in (case.topk_weights, got.topk_weights))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0.0)


@brief
@given(any_cases(min_live=1), seeds)
def test_the_id_of_free_slots_is_all_that_their_kind_decides(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """Weights, U and counts are the same, and so are the ids of slots that hold an expert."""
    call = call_of(case, seed=seed)
    got = implementation(call)
    other = implementation(replace(call, free_slots=FreeSlots.REPEAT_FIRST))
    is_free = got.topk_ids == FREE
    firsts = got.topk_ids[:, :1].clone()
    padded = [b for b in range(case.num_rows) if b not in case.live]
    firsts[padded] = int(got.union.int().argmax())
    filled = torch.where(is_free, firsts, got.topk_ids)
    assert_same(replace(got, topk_ids=filled), other)


@brief
@given(any_cases(min_rows=2), st.randoms(use_true_random=False), seeds)
def test_permuting_rows_permutes_the_outcome(
    compiled: Implementation, case: Case, random: Any, seed: int
) -> None:
    """The order of the rows in the batch does not matter, nor does the order of threads."""
    order = list(range(case.num_rows))
    random.shuffle(order)
    got = compiled(call_of(case))
    permuted = compiled(call_of(case.rows(order), seed=seed))
    picked = replace(got, topk_ids=got.topk_ids[order], topk_weights=got.topk_weights[order])
    assert_same(permuted, picked)


def with_padding(case: Case, places: Sequence[int], seed: int) -> Case:
    """Padded rows that hold anything, inserted before the rows `places`."""
    noise = np.random.default_rng(seed)
    n, k = case.num_experts, case.top_k
    for place in places:
        rows = {
            "scores": torch.from_numpy(make_scores(noise, "special", (1, n))),
            "gates": torch.from_numpy(noise.choice((np.nan, np.inf, 1.0), (1, n))),
            "topk_ids": torch.from_numpy(noise.choice((-1, 0, n, 2**31 - 1), (1, k))),
            "topk_weights": torch.from_numpy(noise.choice((np.nan, 7.0), (1, k))),
        }
        changes: dict[str, Any] = {
            name: torch.cat((old[:place], row.to(old.dtype), old[place:]))
            for name, row in rows.items()
            for old in (getattr(case, name),)
        }
        changes["row_specs"] = (*case.row_specs[:place], None, *case.row_specs[place:])
        case = replace(case, **changes)
    return case


@brief
@given(any_cases(), st.lists(st.integers(0, 24), min_size=1, max_size=3), seeds)
def test_adding_padded_rows_changes_nothing(
    compiled: Implementation, case: Case, places: list[int], seed: int
) -> None:
    """Padding anywhere, holding anything, leaves the other rows and the counts alone, and is free
    in every slot."""
    places = sorted((min(place, case.num_rows) for place in places), reverse=True)
    padded = with_padding(case, places, seed)
    added = {place + i for i, place in enumerate(reversed(places))}
    kept = [b for b in range(padded.num_rows) if b not in added]
    got, more = compiled(call_of(case)), compiled(call_of(padded, seed=seed))
    assert_same(
        replace(more, topk_ids=more.topk_ids[kept], topk_weights=more.topk_weights[kept]), got
    )
    for row in added:
        assert more.topk_ids[row].tolist() == [FREE] * case.top_k
        assert more.topk_weights[row].tolist() == [0.0] * case.top_k


@brief
@given(any_cases(kinds=("topk",), min_live=1), st.none() | st.integers(1, 8), st.integers(1, 128))
def test_one_live_row_under_oea_is_pruned_as_by_topk(
    compiled: Implementation, case: Case, k_max: int | None, max_rank: int
) -> None:
    """Alone in its batch an oea row finds nothing to share, so oea(k0) equals topk(k0)."""
    first = case.live[0]
    rows = tuple(i if b == first else None for b, i in enumerate(case.row_specs))
    limits = {
        "k_max": None if k_max is None else min(k_max, case.top_k),
        "max_rank": min(max_rank, case.num_experts),
    }
    oea = tuple(
        {**OEA_2, "k0": spec["k0"], "compensation": spec["compensation"], **limits}
        for spec in case.specs
    )
    alone = replace(case, row_specs=rows)
    assert_same(compiled(call_of(replace(alone, specs=oea))), compiled(call_of(alone)))


NO_WEIGHT: tuple[Spec, ...] = (*ONE_OF_EACH, {**BUDGET_5, **MAPPED}, {**OEA_2, **MAPPED})


@pytest.mark.parametrize("spec", NO_WEIGHT, ids=str)
def test_rows_of_nan_keep_their_base(implementation: Implementation, spec: Spec) -> None:
    """A row whose every score and gate is NaN leaves as it came, and no slot of it has moved."""
    case = replace(varied_case((2, 9, 3), seed=1), specs=(spec,), row_specs=(0, 0))
    if spec["kind"] == "sere":
        case = replace(
            case, specs=({**spec, "threshold": 1.5},)
        )  # it moves slots, not for their gates
    case = replace(
        case,
        scores=torch.full_like(case.scores, torch.nan),
        gates=torch.full_like(case.gates, torch.nan),
    )
    got = implementation(call_of(case))
    assert torch.equal(got.topk_ids, case.topk_ids)
    assert_same_bits(got.topk_weights, case.topk_weights)
    num_active = len(set(case.topk_ids.flatten().tolist()))
    assert got.statistics[2:5] == [num_active, num_active, 0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("logit", [-79.5, -80.0, -80.5, -88.0, -96.0, -103.0, -104.0, -200.0])
def test_an_expert_has_weight_down_to_the_same_logit_everywhere(
    implementation: Implementation, logit: float, scoring: Any, dtype: torch.dtype
) -> None:
    """The batch loads expert 1 alone, whose `logit` is all that row 0 has for it: at -80 the row
    takes it, below it keeps its base. Float32 would go on for a while."""
    rest = [-torch.inf] * 6
    logits = torch.tensor([[0.0, logit, *rest], [-20.0, 0.0, *rest], [-20.0, 0.0, *rest]])
    budget = to_policy({**BUDGET_5, "max_active": 1})
    call = Call(
        scores=logits.to(dtype),
        policy_ids=torch.zeros(3, dtype=torch.int32),
        table=build_table([budget], layer=0, top_k=2, num_experts=8),
        router=Router(scoring=scoring),
        topk_ids=torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.int32),
        topk_weights=torch.tensor([[0.125, 0.5], [0.5, 0.5], [0.5, 0.5]]),
    )
    got = implementation(call)
    assert got.union.nonzero().flatten().tolist() == [1]
    assert got.topk_ids[1:].tolist() == [[1, FREE]] * 2
    takes_it = logit >= -80.0
    assert got.topk_ids[0].tolist() == ([1, FREE] if takes_it else [1, 0])
    assert got.topk_weights[0].tolist() == ([0.625, 0.0] if takes_it else [0.125, 0.5])
    assert got.statistics == [1, 3, *([1, 2, 3, 0] if takes_it else [2, 2, 2, 1])]


def with_k0_of_0(case: Case) -> Case:
    specs = tuple({**s, "k0": 0} if s["kind"] == "budget" else s for s in case.specs)
    return keep_off_close_demands(replace(case, specs=specs))


@brief
@given(any_cases(kinds=("budget",)), seeds)
def test_the_budget_is_a_bound(implementation: Implementation, case: Case, seed: int) -> None:
    """Budget rows alone, without k0, run max_active experts at most, beside those of rows that keep
    their base because nothing loaded has weight for them: the critical ones."""
    case = with_k0_of_0(case)
    got = implementation(call_of(case, seed=seed))
    wanted = [spec["max_active"] for spec in map(case.spec, case.live) if spec is not None]
    assert got.union.sum() <= max(wanted, default=0)
    active, critical = got.statistics[2], got.statistics[5]
    assert active - critical <= max(wanted, default=0)
    if (case.gates > 0).all():
        assert critical == 0


@brief
@given(any_cases(kinds=("budget", "oea", "vanilla")), seeds)
def test_company_takes_nothing_from_the_budget(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """What budget rows load among themselves they also load beside rows of other policies."""
    kinds = [spec["kind"] for spec in case.specs]
    is_budget = [i is not None and kinds[i] == "budget" for i in case.row_specs]
    rows = tuple(i if keep else None for i, keep in zip(case.row_specs, is_budget, strict=True))
    alone = implementation(call_of(replace(case, row_specs=rows), seed=seed))
    got = implementation(call_of(case, seed=seed))
    assert not (alone.union.bool() & ~got.union.bool()).any()


@brief
@given(any_cases(kinds=("budget", "vanilla")), seeds)
def test_what_fits_the_budget_keeps_its_experts(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """A call whose choice is no larger than the budget and weighs something moves no slot."""
    room = len({j for row in case.live for j in case.topk_ids[row].tolist()})
    specs = tuple({**s, "max_active": max(room, 1)} if "max_active" in s else s for s in case.specs)
    got = implementation(
        call_of(replace(case, specs=specs, gates=case.gates.nan_to_num(1.0) + 0.125), seed=seed)
    )
    assert torch.equal(
        got.topk_ids.sort().values[case.live], case.topk_ids.sort().values[case.live]
    )
    assert got.statistics[4] == 0


@brief
@given(any_cases(kinds=("oea", "budget", "vanilla")), seeds)
def test_no_mapped_share_is_no_mapping(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """With a share of 0 it does not matter whether there are similarities."""
    plain = with_every(case, mapped_share=0.0).specs
    bare = tuple({k: v for k, v in spec.items() if k != "artifact"} for spec in plain)
    got = implementation(call_of(replace(case, specs=plain), seed=seed))
    without = replace(case, specs=bare, artifacts={}, coefficients={})
    assert_same(got, implementation(call_of(without, seed=seed)))


OWN_ORDER = ("topk", "oea", "budget")


def with_every(case: Case, **changes: Any) -> Case:
    """The case with these numbers in every policy that re-routes."""
    specs = tuple(s if s["kind"] == "vanilla" else {**s, **changes} for s in case.specs)
    return replace(case, specs=specs)


@brief
@given(any_cases(kinds=OWN_ORDER, weight_types=(torch.float32,)), seeds)
def test_rows_weigh_what_they_kept_and_a_share_of_what_they_lost(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """W * (kept + c * (1 - kept)) in all, of which a mapped share weighs what the row came with."""
    case = replace(case, gates=case.gates.nan_to_num(1.0) + 0.125, renormalize=True)
    case = keep_off_thresholds(case)
    got = implementation(call_of(case, seed=seed))
    for b in case.live:
        spec, final = case.spec(b) or {}, set(got.topk_ids[b].tolist())
        base = case.topk_ids[b].tolist()
        lost = sum(case.gates[b, j].item() for j in base if j not in final)
        share = 1 if spec["compensation"] is None else spec["compensation"]
        given_up = (1 - share) * lost / case.gates[b, base].double().sum()
        target = 1 - given_up * (1 - spec.get("mapped_share", 0.0))
        total = case.topk_weights[b].double().sum()
        torch.testing.assert_close(
            got.topk_weights[b].double().sum(), total * target, rtol=1e-5, atol=0.0
        )


@brief
@given(any_cases(kinds=OWN_ORDER, weight_types=(torch.float32,)), seeds)
def test_full_compensation_is_what_the_papers_do(
    implementation: Implementation, case: Case, seed: int
) -> None:
    """Where the model normalises, c = 1 is its own weights, to two units in the last place."""
    case = replace(case, renormalize=True)
    plain, full = (
        implementation(call_of(with_every(case, compensation=c), seed=seed)) for c in (None, 1.0)
    )
    assert torch.equal(full.topk_ids, plain.topk_ids)
    torch.testing.assert_close(full.topk_weights, plain.topk_weights, rtol=2 * 2.0**-23, atol=0.0)


@brief
@given(any_cases(), st.sampled_from((None, 0.0, 0.5, 1.0)), seeds)
def test_a_row_whose_choice_is_loaded_stays_as_it_is(
    implementation: Implementation, case: Case, compensation: float | None, seed: int
) -> None:
    """Bit for bit, in the engine's order of columns, unless its policy cuts it."""
    case = keep_off_thresholds(with_every(case, compensation=compensation))
    got = implementation(call_of(case, seed=seed))
    for b in case.live:
        numbers = numbers_of(case.spec(b) or {"kind": "vanilla"})
        is_cut = numbers["threshold"] is None and (
            min(numbers["k_max"], numbers["max_rank"]) < case.top_k
        )
        if got.union[case.topk_ids[b]].all() and not is_cut:
            assert torch.equal(got.topk_ids[b], case.topk_ids[b])
            assert_same_bits(got.topk_weights[b], case.topk_weights[b])


def test_an_empty_matrix_may_have_any_strides() -> None:
    """Without a single row there is nothing that could lie apart."""
    if native.choose("cpu").module is None:
        pytest.skip(native.choose("cpu").reason)
    call = call_of(varied_case((0, 9, 3), seed=1))
    empty = {
        name: torch.empty_strided(x.shape, (0, 0), dtype=x.dtype)
        for name, x in call.tensors.items()
    }
    ids, _, union = kernels.refine(
        **empty, policy_ids=call.policy_ids, table=call.table, router=call.router
    )
    assert ids.shape == (0, 3)
    assert not union.any()


def test_statistics_add_up_over_calls(compiled: Implementation) -> None:
    """Each call reports its own counts only; nothing lingers from the call before."""
    small, large = (varied_case((rows, 60, 4), seed=1) for rows in (5, 70))
    alone = compiled(call_of(small))
    compiled(call_of(large))
    assert_same(compiled(call_of(small)), alone)


def test_padding_is_marked_by_one_number() -> None:
    """The kernels' constant for padding is the package's."""
    assert PAD == -1
