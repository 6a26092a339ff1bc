"""The plain-torch reference against the oracle, and the properties that the semantics promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sglang_moe_routing.policies import (
    FREE,
    FreeSlots,
    Rerouted,
    reroute,
)
from sglang_moe_routing.testing import oracle
from tests.cases import (
    BUDGET_5,
    MAPPED,
    OEA_2,
    ONE_OF_EACH,
    SERE_1,
    Case,
    Spec,
    ask_oracle,
    assert_close,
    assert_distinct_experts,
    assert_same_bits,
    cases,
    make_scores,
    numbers_of,
    policy_ids,
    small_case,
    table_of,
)

thorough = settings(max_examples=300, deadline=None, database=None)
brief = settings(max_examples=150, deadline=None, database=None)


def run(
    case: Case,
    ids_dtype: torch.dtype = torch.int64,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> Rerouted:
    return reroute(
        case.scores,
        case.gates,
        case.topk_ids,
        case.topk_weights,
        policy_ids(case, ids_dtype),
        table_of(case),
        renormalize=case.renormalize,
        scale=case.scale,
        free_slots=free_slots,
    )


# --- against the oracle ------------------------------------------------------------------------


@thorough
@given(cases(), st.sampled_from((torch.int32, torch.int64)))
def test_any_mix_of_policies_gives_what_the_oracle_gives(case: Case, dtype: torch.dtype) -> None:
    """Ids, weights, the active set and both counts equal those of the slow loops."""
    got, expected = run(case, dtype), ask_oracle(case)
    assert got.topk_ids.dtype == case.topk_ids.dtype
    assert got.topk_weights.dtype == case.topk_weights.dtype
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert got.union.nonzero().flatten().tolist() == expected.active
    assert got.active.item() == expected.distinct
    assert got.active_base.item() == expected.distinct_base
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))


@brief
@given(cases(kinds=("oea",)))
def test_oea_in_all_its_forms_gives_what_the_oracle_gives(case: Case) -> None:
    """A batch of oea rows alone follows the oracle under every p, k_max and max_rank."""
    got, expected = run(case), ask_oracle(case)
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))
    assert got.active.item() == (got.union.sum() + got.critical).item()


@brief
@given(cases(kinds=("sere", "sere", "topk")))
def test_sere_over_several_artifacts_gives_what_the_oracle_gives(case: Case) -> None:
    """Rows under sere follow their own artifact and threshold, ties included."""
    got, expected = run(case), ask_oracle(case)
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))


@brief
@given(cases(kinds=("budget", "budget", "oea", "sere")))
def test_budget_in_all_its_forms_gives_what_the_oracle_gives(case: Case) -> None:
    """Mostly budget rows, so that few experts are required and demand decides, mapped or not."""
    got, expected = run(case), ask_oracle(case)
    assert got.union.nonzero().flatten().tolist() == expected.active
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert_close(got.topk_weights, torch.from_numpy(expected.weights))


def test_every_input_may_be_non_contiguous() -> None:
    """Strided inputs give what their contiguous copies give."""
    case = small_case(ONE_OF_EACH, (0, 1, 2, 3, 4, 5, None))

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor), dim=-1)[..., 0]

    spread = replace(
        case,
        scores=strided(case.scores),
        gates=strided(case.gates),
        topk_ids=strided(case.topk_ids),
        topk_weights=case.topk_weights.T.contiguous().T,
    )
    got, expected = run(spread), run(case)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert_same_bits(got.topk_weights, expected.topk_weights)


# --- vanilla -----------------------------------------------------------------------------------


def with_odd_weights(case: Case) -> Case:
    """NaN, -0.0 and infinite weights on some slots of vanilla rows, which must pass through."""
    weights = case.topk_weights.clone()
    odd = torch.tensor([float("nan"), -0.0, float("inf")]).to(weights.dtype)
    for row in case.live:
        if case.spec(row) == {"kind": "vanilla"}:
            weights[row, row % case.top_k] = odd[row % 3]
    return replace(case, topk_weights=weights)


@brief
@given(cases())
def test_vanilla_rows_pass_bit_for_bit(case: Case) -> None:
    """A vanilla row leaves with the very bits it came with, odd weights included."""
    case = with_odd_weights(case)
    got = run(case)
    for row in case.live:
        if case.spec(row) == {"kind": "vanilla"}:
            assert torch.equal(got.topk_ids[row], case.topk_ids[row])
            assert_same_bits(got.topk_weights[row], case.topk_weights[row])


@brief
@given(cases(min_live=1), st.data())
def test_a_vanilla_row_does_not_depend_on_its_neighbours(case: Case, data: st.DataObject) -> None:
    """A vanilla row routes alike whatever its neighbours hold and whatever policy they follow."""
    row = data.draw(st.sampled_from(case.live))
    specs = (*case.specs, {"kind": "vanilla"})
    others = data.draw(
        st.lists(
            st.none() | st.integers(0, len(specs) - 1),
            min_size=case.num_rows,
            max_size=case.num_rows,
        )
    )
    others[row] = len(specs) - 1
    shift = data.draw(st.integers(0, case.num_rows - 1))
    picked = [(b + shift) % case.num_rows for b in range(case.num_rows)]
    picked[row] = row  # other rows change place and content, this one stays
    before = run(replace(case, specs=specs, row_specs=tuple(others)))
    after_case = replace(case.rows(picked), specs=specs)
    kinds = list(after_case.row_specs)
    kinds[row] = len(specs) - 1
    after = run(replace(after_case, row_specs=tuple(kinds)))
    for got in (before, after):
        assert torch.equal(got.topk_ids[row], case.topk_ids[row])
        assert_same_bits(got.topk_weights[row], case.topk_weights[row])


@brief
@given(cases(min_live=1), st.sampled_from(("topk", "oea", "sere", "budget")))
def test_keeping_all_k_experts_is_vanilla(case: Case, kind: str) -> None:
    """k0 = k or S = k leaves every live row bit for bit, in the engine's column order."""
    k = case.top_k
    full: dict[str, Spec] = {
        "topk": {"kind": "topk", "k0": k},
        "oea": {**OEA_2, "k0": k},
        "sere": {**SERE_1, "num_primary": k, "threshold": -1.0},
        "budget": {**BUDGET_5, **MAPPED, "max_active": 1, "k0": k},
    }
    specs = (full[kind],)
    row_specs = tuple(None if i is None else 0 for i in case.row_specs)
    case = replace(case, specs=specs, row_specs=row_specs)
    got = run(case)
    assert torch.equal(got.topk_ids[case.live], case.topk_ids[case.live])
    assert_same_bits(got.topk_weights[case.live], case.topk_weights[case.live])


# --- the batch ---------------------------------------------------------------------------------


@brief
@given(cases())
def test_rerouting_never_adds_active_experts(case: Case) -> None:
    """T <= T_base, and every final expert is in U or was in the row's own base."""
    got = run(case)
    assert got.active.item() <= got.active_base.item()
    union = set(got.union.nonzero().flatten().tolist())
    for row in case.live:
        assert set(got.topk_ids[row].tolist()) <= union | {*case.topk_ids[row].tolist(), FREE}
    touched = {int(j) for row in case.live for j in got.topk_ids[row]} - {FREE}
    assert got.active.item() == len(touched)
    if all(spec["kind"] != "rule" for spec in case.specs):  # rows that fill U may be cut short
        assert union <= touched


@brief
@given(cases(min_rows=2), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_the_outcome(case: Case, random: Any) -> None:
    """The order of the rows in the batch does not matter."""
    order = list(range(case.num_rows))
    random.shuffle(order)
    got, permuted = run(case), run(case.rows(order))
    assert torch.equal(permuted.topk_ids, got.topk_ids[order])
    assert_close(permuted.topk_weights, got.topk_weights[order])
    assert torch.equal(permuted.union, got.union)
    assert permuted.active.item() == got.active.item()
    assert permuted.active_base.item() == got.active_base.item()


@brief
@given(cases(), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_adding_a_padded_row_changes_nothing(case: Case, place: int, seed: int) -> None:
    """A padded row anywhere, holding anything, leaves the other rows and the counts alone."""
    place = min(place, case.num_rows)
    noise = np.random.default_rng(seed)

    def insert(tensor: Tensor, value: Tensor) -> Tensor:
        return torch.cat((tensor[:place], value.to(tensor.dtype)[None], tensor[place:]))

    n, k = case.num_experts, case.top_k
    padded = replace(
        case,
        scores=insert(case.scores, torch.from_numpy(make_scores(noise, "special", (1, n))[0])),
        gates=insert(case.gates, torch.from_numpy(noise.choice((np.nan, np.inf, 1.0), n))),
        topk_ids=insert(case.topk_ids, torch.from_numpy(noise.choice((-1, 0, n, 2**31 - 1), k))),
        topk_weights=insert(case.topk_weights, torch.from_numpy(noise.choice((np.nan, 7.0), k))),
        row_specs=(*case.row_specs[:place], None, *case.row_specs[place:]),
    )
    got, more = run(case), run(padded)
    kept = [b for b in range(padded.num_rows) if b != place]
    assert torch.equal(more.topk_ids[kept], got.topk_ids)
    assert_close(more.topk_weights[kept], got.topk_weights)
    assert torch.equal(more.union, got.union)
    assert (more.active.item(), more.active_base.item()) == (
        got.active.item(),
        got.active_base.item(),
    )
    assert more.topk_ids[place].tolist() == [FREE] * k
    assert more.topk_weights[place].tolist() == [0.0] * k


@brief
@given(cases(kinds=("topk",), min_live=1), st.none() | st.integers(1, 8), st.integers(1, 128))
def test_one_live_row_under_oea_is_pruned_as_by_topk(
    case: Case, k_max: int | None, max_rank: int
) -> None:
    """Alone in its batch an oea row finds nothing to share, so oea(k0) equals topk(k0)."""
    first = case.live[0]
    alone = replace(
        case,
        row_specs=tuple(i if b == first else None for b, i in enumerate(case.row_specs)),
    )
    oea = tuple(
        {
            **OEA_2,
            "k0": spec["k0"],
            "compensation": spec["compensation"],
            "k_max": None if k_max is None else min(k_max, case.top_k),
            "max_rank": min(max_rank, case.num_experts),
        }
        for spec in case.specs
    )
    got, expected = run(replace(alone, specs=oea)), run(alone)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert_same_bits(got.topk_weights, expected.topk_weights)
    assert got.active.item() == expected.active.item()


@brief
@given(cases(kinds=("oea", "oea", "vanilla", "sere", "topk"), min_live=1), st.data())
def test_an_oea_row_depends_on_its_own_scores_and_the_active_set_alone(
    case: Case, data: st.DataObject
) -> None:
    """Swapping the whole neighbourhood for rows that require the same U changes nothing."""
    oea_rows = [b for b in case.live if case.specs[case.row_specs[b] or 0]["kind"] == "oea"]
    if not oea_rows:
        return
    row = data.draw(st.sampled_from(oea_rows))
    got = run(case)
    union = got.union.nonzero().flatten().tolist()
    k, n = case.top_k, case.num_experts
    chunks = [union[i : i + k] for i in range(0, len(union), k)]
    specs = list(case.specs)
    row_specs: list[int | None] = []
    scores, base = [], []
    for chunk in chunks:  # topk(len(chunk)) whose best experts are this part of U
        rest = [j for j in range(n) if j not in chunk]
        scores.append([1.0 if j in chunk else 0.0 for j in range(n)])
        base.append(chunk + rest[: k - len(chunk)])
        row_specs.append(len(specs))
        specs.append({"kind": "topk", "k0": len(chunk)})
    dtype = case.topk_ids.dtype
    swapped = replace(
        case,
        scores=torch.cat((case.scores[row : row + 1], torch.tensor(scores))),
        gates=torch.cat((case.gates[row : row + 1], torch.ones(len(chunks), n))),
        topk_ids=torch.cat((case.topk_ids[row : row + 1], torch.tensor(base, dtype=dtype))),
        topk_weights=torch.cat(
            (
                case.topk_weights[row : row + 1],
                torch.ones(len(chunks), k, dtype=case.topk_weights.dtype),
            )
        ),
        specs=tuple(specs),
        row_specs=(case.row_specs[row], *row_specs),
    )
    other = run(swapped)
    assert torch.equal(other.union, got.union)
    assert torch.equal(other.topk_ids[0], got.topk_ids[row])
    assert_close(other.topk_weights[0], got.topk_weights[row])


# --- odd input ---------------------------------------------------------------------------------


@brief
@given(cases(), st.integers(0, 2**32 - 1))
def test_rerouted_rows_hold_valid_ids_whatever_comes_in(case: Case, seed: int) -> None:
    """Ids of a re-routed live row lie in [0, N) even where the incoming ids are garbage."""
    rng = np.random.default_rng(seed)
    garbage = [-1, case.num_experts, 2**31 - 1, -(2**31), 0, case.num_experts - 1]
    if case.topk_ids.dtype == torch.int64:
        garbage += [2**63 - 1, -(2**63), 2**32]
    shape = tuple(case.topk_ids.shape)
    noise = torch.from_numpy(rng.choice(np.array(garbage), shape)).to(case.topk_ids.dtype)
    hit = torch.from_numpy(rng.random(shape) < rng.choice((0.3, 1.0)))
    bad = replace(case, topk_ids=torch.where(hit, noise, case.topk_ids))
    got = run(bad)
    for row in case.live:
        spec = case.spec(row)
        if spec is None or oracle.keeps_base(numbers_of(spec), case.top_k):
            assert torch.equal(got.topk_ids[row], bad.topk_ids[row])
        else:
            ids, weights = got.topk_ids[row].tolist(), got.topk_weights[row].tolist()
            assert_distinct_experts(ids, weights, case.num_experts, FreeSlots.IGNORED)


@pytest.mark.parametrize(("p", "required"), [(1.0, 2), (0.99, 1)])
def test_p_of_1_sets_no_mass_limit(p: float, required: int) -> None:
    """With all the mass on one expert, p = 1 still requires k0 experts, and p < 1 only one."""
    case = small_case(({**OEA_2, "k0": 2, "p": p},), (0,))
    best = case.scores.argmax(dim=1, keepdim=True)
    case = replace(case, gates=torch.zeros_like(case.gates).scatter_(1, best, 1.0))
    got = run(case)
    assert got.union.sum().item() == required
    assert got.topk_ids.tolist() == ask_oracle(case).ids.tolist()


def test_a_row_without_gate_mass_keeps_k0_experts_under_a_mass_limit() -> None:
    """No partial mass of an all-zero row reaches p, so k0 alone decides what it requires."""
    spec = {**OEA_2, "k0": 2, "p": 0.5}
    case = small_case((spec,), (0,))
    case = replace(case, gates=torch.zeros_like(case.gates))
    got, expected = run(case), ask_oracle(case)
    assert got.union.nonzero().flatten().tolist() == expected.active
    assert got.topk_ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("gate", [2.0**-130, 2.0**-100, 2.0**100])
def test_weights_are_finite_at_extreme_gates(gate: float) -> None:
    """Equal gates share the incoming row sum equally, however small or large they are."""
    case = small_case(({"kind": "topk", "k0": 2},), (0,))
    case = replace(
        case,
        gates=torch.full_like(case.gates, gate),
        topk_weights=torch.full_like(case.topk_weights, 1.0),
    )
    assert run(case).topk_weights.tolist() == [[1.5, 1.5, 0.0]]


def test_padding_that_must_name_an_expert_names_an_active_one() -> None:
    """Padded rows are pointed at the lowest active expert even if every live row is vanilla."""
    case = small_case(({"kind": "vanilla"},), (None, 0, 0, None))
    got = run(case, free_slots=FreeSlots.REPEAT_FIRST)
    lowest = int(case.topk_ids[1:3].min())
    assert got.topk_ids[[0, 3]].tolist() == [[lowest] * 3] * 2
    assert got.topk_weights[[0, 3]].tolist() == [[0.0] * 3] * 2


# --- worked examples ---------------------------------------------------------------------------


def worked(specs: Sequence[Spec], rows: Sequence[Sequence[float]], base: Any, **more: Any) -> Case:
    scores = torch.tensor(rows)
    ids = torch.tensor(base)
    return Case(
        scores=scores,
        gates=scores.softmax(dim=1),
        topk_ids=ids,
        topk_weights=torch.full(ids.shape, 1.0 / ids.shape[1]),
        specs=tuple(specs),
        row_specs=tuple(range(len(specs))),
        artifacts=more,
    )


def test_a_vanilla_neighbour_can_be_piggybacked_on() -> None:
    """An oea row swaps its dropped expert for the next ranked one that a vanilla row loads."""
    oea = {**OEA_2, "k0": 1}
    case = worked(
        ({"kind": "vanilla"}, oea),
        [[9.0, 0.0, 8.0, 0.0, 0.0], [3.0, 9.0, 1.0, 8.0, 0.0]],
        [[2, 0], [3, 1]],
    )
    got = run(case)
    assert got.topk_ids.tolist() == [[2, 0], [1, 0]]
    assert (got.active.item(), got.active_base.item()) == (3, 4)


@pytest.mark.parametrize(("max_rank", "slots"), [(2, [1, FREE]), (3, [1, 0]), (5, [1, 0])])
def test_max_rank_counts_from_one(max_rank: int, slots: list[int]) -> None:
    """The third best expert may piggyback at max_rank 3 and not at max_rank 2."""
    oea = {**OEA_2, "k0": 1, "max_rank": max_rank}
    case = worked(
        ({"kind": "vanilla"}, oea),
        [[9.0, 0.0, 8.0, 0.0, 0.0], [3.0, 9.0, 1.0, 8.0, 0.0]],
        [[2, 0], [3, 1]],
    )
    assert run(case).topk_ids[1].tolist() == slots


@pytest.mark.parametrize(("rho", "slot"), [(0.25, 0), (0.2500001, 3)])
def test_an_expert_at_the_threshold_is_rerouted_and_below_it_stays(rho: float, slot: int) -> None:
    """Sim >= rho re-routes, Sim < rho makes the slot's own expert critical."""
    sim = torch.eye(5)
    sim[3] = torch.tensor([0.25, 0.25, -1.0, 1.0, 1.0])
    sere = {"kind": "sere", "num_primary": 1, "threshold": rho, "artifact": "a"}
    case = worked(
        ({"kind": "vanilla"}, sere),
        [[9.0, 0.0, 8.0, 0.0, 0.0], [0.0, 9.0, 0.0, 8.0, 0.0]],
        [[2, 0], [3, 1]],
        a=sim,
    )
    got = run(case)
    assert got.topk_ids[1].tolist() == [slot, 1]
    assert_same_bits(got.topk_weights[1], case.topk_weights[1])


@pytest.mark.parametrize(
    ("utility", "max_active", "union"),
    [
        ("squared_gate", 1, [3]),
        ("squared_gate", 3, [0, 3, 4]),
        ("squared_gate", 5, [0, 1, 3, 4]),
        ("gate", 1, [0]),
        ("gate", 3, [0, 1, 3]),
        ("gate", 5, [0, 1, 3, 4]),
    ],
)
def test_the_budget_goes_where_the_demand_is(
    utility: str, max_active: int, union: list[int]
) -> None:
    """By gate the demands for 0, 1, 3 and 4 tie at 3/4; by squared gate those for 3 and 4 are
    9/16 and those for 0 and 1 are 5/16. Nobody asks for 2."""
    spec = {**BUDGET_5, "max_active": max_active, "utility": utility}
    case = worked([spec] * 3, [[3.0, 3.0, 0.0, 0.0, 0.0]] * 3, [[0, 1]] * 3)
    gates = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.25, 0, 0, 0.75, 0], [0, 0.25, 0, 0, 0.75]])
    base = torch.tensor([[0, 1], [3, 0], [1, 4]])
    got = run(replace(case, gates=gates, topk_ids=base))
    assert got.union.nonzero().flatten().tolist() == union


def test_a_lost_experts_weight_goes_to_the_most_similar_one() -> None:
    """Expert 3 is lost: half of its weight follows it to 2, though 2 is the row's second choice."""
    sim = torch.eye(5)
    sim[3, 2], sim[3, 1] = 0.75, 0.5
    oea = {**OEA_2, "k0": 1, "mapped_share": 0.5, "artifact": "a"}
    case = worked(
        ({"kind": "vanilla"}, oea),
        [[9.0, 0.0, 8.0, 0.0, 0.0], [0.0, 9.0, 7.0, 8.0, 0.0]],
        [[2, 0], [3, 1]],
        a=sim,
    )
    case = replace(case, topk_weights=torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    got = run(case)
    gates = torch.tensor([9.0, 7.0]).softmax(dim=0)
    assert got.topk_ids[1].tolist() == [1, 2]
    torch.testing.assert_close(got.topk_weights[1], 0.5 * gates + 0.5 * torch.tensor([0.75, 0.25]))


def test_critical_experts_do_not_join_the_active_set() -> None:
    """One row's critical expert is no target for another row's slot."""
    sim = torch.full((5, 5), -1.0)
    sim[4, 3] = 1.0  # 3 stands in for 4 perfectly, but only row 0 runs 3, as a critical expert
    sere = {"kind": "sere", "num_primary": 1, "threshold": 0.0, "artifact": "a"}
    case = worked(
        (sere, sere),
        [[9.0, 0.0, 0.0, 8.0, 0.0], [9.0, 0.0, 0.0, 0.0, 8.0]],
        [[0, 3], [0, 4]],
        a=sim,
    )
    got = run(case)
    assert got.topk_ids.tolist() == [[0, 3], [0, 4]]
    assert got.union.nonzero().flatten().tolist() == [0]


def test_ties_and_signed_zeros_go_to_the_lower_id_and_nan_goes_last() -> None:
    """Beyond the base, equal scores rank by id, -0.0 ties with 0.0, and NaN ranks last."""
    nan = float("nan")
    scores = [9.0, nan, -0.0, 0.0, -torch.inf]
    oea = {**OEA_2, "k0": 1}
    every = {"kind": "vanilla"}
    neighbour = [0.0, 1.0, 2.0, 3.0, 4.0]
    for base, expected in (
        ([[4, 1, 0], [4, 3, 2]], [2, 4, 0]),  # of the base, 2 ties with 3 and wins
        ([[0, 1, 2], [4, 3, 1]], [3, 1, 0]),  # the base comes first, its NaN too
        ([[0, 2, 3], [1, 4, 0]], [0, 2, 3]),
        ([[1, 4, 2], [0, 2, 3]], [0, 2, 4]),  # NaN comes after -inf
        ([[1, 4, 0], [0, 2, 3]], [0, 4, 1]),
    ):
        case = worked((every, oea), [neighbour, scores], base)
        got = run(replace(case, gates=torch.ones(2, 5)))
        assert got.topk_ids[1].tolist() == expected


# --- capture safety ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 6])
def test_reroute_needs_no_value_of_any_tensor_on_the_host(num_rows: int) -> None:
    """Under fake tensors, which have no values, reroute runs: no sync, no data-made shape."""
    case = small_case(ONE_OF_EACH, [0, 1, 2, 3, 4, 5][:num_rows])
    table, plan = table_of(case), policy_ids(case)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        got = reroute(
            fake(case.scores),
            fake(case.gates),
            fake(case.topk_ids),
            fake(case.topk_weights),
            fake(plan),
            replace(table, words=fake(table.words), similarity=fake(table.similarity)),
            renormalize=True,
        )
    assert got.topk_ids.shape == case.topk_ids.shape
    assert got.topk_weights.dtype == case.topk_weights.dtype
    assert got.union.shape == (case.num_experts,)
    assert got.active.shape == got.active_base.shape == ()


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: x[x.long().sum()],
    ],
    ids=["item", "nonzero", "bool", "index"],
)
def test_fake_tensors_do_refuse_a_host_sync(look: Any) -> None:
    """The test above can fail: reading a value or making a shape from data raises there."""
    refusals = (DataDependentOutputException, DynamicOutputShapeException)
    with FakeTensorMode() as mode, pytest.raises(refusals):
        look(mode.from_tensor(torch.ones(3)))


@brief
@given(cases())
def test_inputs_are_not_modified(case: Case) -> None:
    """Every input tensor and the table hold the same bits afterwards."""
    table, plan = table_of(case), policy_ids(case)
    inputs = [
        case.scores,
        case.gates,
        case.topk_ids,
        case.topk_weights,
        plan,
        table.words,
        table.similarity,
    ]
    copies = [tensor.clone() for tensor in inputs]
    got = reroute(
        case.scores,
        case.gates,
        case.topk_ids,
        case.topk_weights,
        plan,
        table,
        renormalize=case.renormalize,
        scale=case.scale,
    )
    for tensor, copy in zip(inputs, copies, strict=True):
        assert_same_bits(tensor, copy)
    if case.num_rows:
        owned = {got.topk_ids.data_ptr(), got.topk_weights.data_ptr()}
        assert not owned & {tensor.data_ptr() for tensor in inputs}
