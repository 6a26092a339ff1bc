"""Faults planted in the kernels, and which build of the simulator must see each of them.

The tests of routing are worth what they would notice. A mutant is a copy of csrc in which one
place reads differently; the same few calls that pass on the real sources must fail on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sglang_moe_routing.policies import Budget, FreeSlots, Router, TopK, Vanilla, build_table
from sglang_moe_routing.policies.schedule import CountSchedule
from tests.cases import (
    BUDGET_5,
    MAPPED,
    OEA_2,
    SERE_1,
    Case,
    Spec,
    keep_off_close_demands,
    keep_off_thresholds,
    varied_case,
)
from tests.kernels import building
from tests.kernels.building import FLAVOURS, Flavour
from tests.kernels.conftest import Call, Simulated, ask_reference, assert_agrees, call_of
from tests.kernels.driver import Driver, Outcome, build_driver

RIGHT = "right"
WRONG = "wrong: "
RACE = "WARNING: ThreadSanitizer: data race"
OVERFLOW = "ERROR: AddressSanitizer: heap-buffer-overflow"
OWN_MASK = "calling lane is not in its own mask"
DIVERGENT = "divergent __syncthreads"

KERNELS = "cuda/route.cuh"
WARP = "cuda/warp_row.cuh"
ROW = "include/moe_routing/row.h"
NUMBERS = "include/moe_routing/numbers.h"


class Mutant(NamedTuple):
    """One place of one source file that reads differently, and what builds must say to it."""

    file: str
    old: str
    new: str
    caught: dict[Flavour, str]
    where: str = ""
    """Occurs once in the file and holds `old` once; `old` itself if empty."""


def wrong(file: str, old: str, new: str, where: str = "") -> Mutant:
    """The plain build gives a wrong outcome."""
    return Mutant(file, old, new, {"plain": WRONG}, where)


def race(file: str, old: str, new: str = "", where: str = "") -> Mutant:
    """Results need not show it, but TSan does."""
    return Mutant(file, old, new, {"tsan": RACE}, where)


def overflow(file: str, old: str, new: str, where: str) -> Mutant:
    """ASan sees an access beyond a buffer."""
    return Mutant(file, old, new, {"asan": OVERFLOW}, where)


BARRIER = "__syncthreads();\n"
FENCE = "__threadfence();\n"
NUM_LIVE = "const int num_live = __syncthreads_count(is_live);"
UNORDERED_NUM_LIVE = """int num_live = is_live ? 0 : 0;
  for (int row = 0; row < call.num_rows; ++row) num_live += call.policy_ids[row] != kPad;"""
ROWS_OF_PASS_1 = """row < call.num_rows; row += stride) {
    const int policy_id = call.policy_ids[row];"""
FILL = "fill_union<kPerLane>(call, shared);\n"

# No build notices when the last block's reader has no fence: fences are matched with atomics
# without regard to addresses (simt/README.md), and the block has run other atomics before.
SYNCHRONISATION = {
    "no_barrier_between_the_passes": Mutant(
        KERNELS,
        BARRIER,
        "",
        {"plain": WRONG, "tsan": RACE},
        f"{BARRIER}  if (shared.wanted > 0) {{\n    if (row == 0)",
    ),
    "no_barrier_after_filling": race(KERNELS, BARRIER, where=f"{FILL}    {BARRIER}"),
    "no_barrier_after_filling_in_pass_2": race(KERNELS, BARRIER, where=f"{FILL}        {BARRIER}"),
    "no_barrier_after_gathering_demand": race(
        KERNELS, BARRIER, where=f"{BARRIER}}}\n\n// The last block"
    ),
    "demand_without_atomics": race(
        WARP,
        "atomicAdd(&shared_.demand[demand.id], demand.quanta)",
        "shared_.demand[demand.id] += demand.quanta",
    ),
    "gathered_demand_without_atomics": race(
        KERNELS,
        "atomicAdd(&shared.demand[i * kWarp + lane], demand[i])",
        "shared.demand[i * kWarp + lane] += demand[i]",
    ),
    "wanted_without_atomics": race(
        WARP,
        "atomicMax(&shared_.wanted, policy_->max_active)",
        "shared_.wanted = policy_->max_active",
    ),
    "no_barrier_after_clearing_in_one_block": race(KERNELS, NUM_LIVE, UNORDERED_NUM_LIVE),
    "no_barrier_after_clearing_in_pass_1": race(
        KERNELS, BARRIER, where=f"{BARRIER}  const int step = call.num_steps > 1"
    ),
    "no_barrier_after_clearing_in_pass_2": race(
        KERNELS, BARRIER, where=f"{BARRIER}  const bool counts"
    ),
    "no_barrier_after_gathering": race(
        KERNELS, BARRIER, where=f"{BARRIER}}}\n\n// The demand that all"
    ),
    "no_barrier_before_statistics": race(
        KERNELS, BARRIER, where=f"{BARRIER}  if (thread == 0) {{\n    add_statistics"
    ),
    "warps_without_rows_miss_the_barrier": Mutant(
        KERNELS, "waits || row", "row", {"plain": DIVERGENT}
    ),
    "union_without_atomics": race(WARP, "atomicOr(&set[lane_], mine)", "set[lane_] |= mine"),
    "count_without_atomics": race(
        WARP, "atomicAdd(&shared_.num_moved, n)", "shared_.num_moved += n"
    ),
    "pass_2_does_not_wait": race(KERNELS, "simt::grid_dependency_wait();"),
    "last_block_no_writer_fence": race(KERNELS, FENCE, where=f"= shared.num_moved;\n  {FENCE}"),
    "every_lane_writes_what_was_gathered": race(
        KERNELS,
        "if (threadIdx.x % kWarp == 0) ",
        where="if (threadIdx.x % kWarp == 0) {\n      shared.before",
    ),
    "half_a_warp_adds": Mutant(WARP, "kAll, count", "0xffffu, count", {"plain": OWN_MASK}),
    "half_a_warp_votes": Mutant(
        WARP, "__ballot_sync(kAll, lane_", "__ballot_sync(0xffffu, lane_", {"plain": OWN_MASK}
    ),
}

MEMORY = {
    "one_row_too_many": overflow(KERNELS, "row < call", "row <= call", ROWS_OF_PASS_1),
    "one_score_too_many": overflow(
        WARP, ">= call_", "> call_", "(expert >= call_.num_experts) continue;\n      pool_"
    ),
    "one_slot_too_many": wrong(
        WARP, ">= call_", "> call_", "(lane_ >= call_.top_k) return;\n    store_id"
    ),
    "id_out_of_range": wrong(WARP, "id >= 0 && id < call_.num_experts ?", "id >= 0 ?"),
    "repeated_ids_count_twice": wrong(WARP, "if (is_repeated) key = 0;", ""),
    "union_not_cleared": wrong(KERNELS, "shared.required[threadIdx.x] = 0;", ""),
    "demand_not_cleared": wrong(KERNELS, "shared.demand[j] = 0;", "(void)j;"),
    "demand_of_blocks_that_want_nothing": wrong(
        KERNELS, "if (workspace.wanted[block] == 0) continue;", ""
    ),
}

ORDER = {
    "signed_zeros_differ": wrong(NUMBERS, "bits_of(value + 0.0f)", "bits_of(value)"),
    "signed_zeros_differ_where_packed": wrong(WARP, "if (magnitude == 0) key = 0x8000u;", ""),
    "ties_go_to_the_higher_id": wrong(
        WARP,
        "int i = kPerLane - 1; i >= 0; --i",
        "int i = 0; i < kPerLane; ++i",
    ),
    "packed_scores_lose_bits": wrong(WARP, "return key << 16 |", "return (key & ~7u) << 16 |"),
    "nan_comes_first": wrong(NUMBERS, "? 1u : key", "? ~0u : key"),
    "nan_comes_first_where_packed": wrong(
        WARP, "key = 0;", "key = 0xffffu;", "(magnitude > infinity) key = 0;"
    ),
    "biased_scores_taken_for_packed": wrong(
        KERNELS, "!= FloatType::float32 && call.bias == nullptr", "!= FloatType::float32"
    ),
    "grouped_scores_taken_for_packed": wrong(KERNELS, "call.num_groups == 1;", "true;"),
}

POLICIES = {
    "threshold_itself_is_critical": wrong(
        ROW,
        "nearest.similarity < row.policy().threshold",
        "nearest.similarity <= row.policy().threshold",
    ),
    "one_rank_too_many": wrong(ROW, ") >= max_rank", ") > max_rank"),
    "one_rank_too_many_in_the_base": wrong(ROW, "t < max_rank", "t <= max_rank"),
    "one_expert_too_many": wrong(ROW, "while (n < limit)", "while (n <= limit && n < k)"),
    "mass_needs_one_more": wrong(ROW, "return t + 1;", "return smaller(t + 2, count);"),
    "step_starts_late": wrong(ROW, ".start <= num_live", ".start < num_live"),
    "filler_weighs": wrong(WARP, "if (lane_ < n) gate", "gate"),
    "slots_of_one_expert_stay_apart": wrong(
        ROW, "if (before == 0) continue;", "if (before == 0 || t > 0) continue;"
    ),
    "merged_slots_lose_weight": wrong(ROW, " + row.get(weights, t));", ");"),
    "free_slots_name_the_best_expert": wrong(
        ROW, "kFree : row.get(ids, 0);", "kFree : row.get(order, 0);"
    ),
    "free_slots_are_always_ignored": wrong(ROW, "kFree : row.get(ids, 0);", "kFree : kFree;"),
    "free_slots_are_mixed_up": wrong(
        ROW, "FreeSlots::ignored ? kFree", "FreeSlots::repeat_first ? kFree"
    ),
    "padding_always_names_an_expert": wrong(
        KERNELS, "if (call.free_slots == FreeSlots::ignored) return kFree;", "(void)call;"
    ),
    "rows_without_weight_stay_so": wrong(
        ROW, "> 0.0f; }) == 0)", "> 0.0f; }) == 0 && row.is(kMoves))"
    ),
    "mapped_rows_without_weight_stay_so": wrong(
        ROW,
        "return row.at(gates, t) > 0.0f; }) == 0)",
        "return row.at(gates, t) > 0.0f || row.policy().mapped_share > 0.0f; }) == 0)",
    ),
    "loaded_rows_are_weighed_again": wrong(ROW, "if (!is_whole)", "if (!is_whole || k > 0)"),
    "cut_rows_stay_whole": wrong(ROW, "policy.max_rank) < k)", "policy.max_rank) < 0 * k)"),
    "rows_with_repeated_ids_stay_whole": wrong(
        ROW, "is_whole = n == call.top_k", "is_whole = true"
    ),
    "compensation_of_nothing": wrong(
        ROW, "kept + share * (1.0f - kept);", "kept + share + 1.0f - kept;"
    ),
    "compensation_counts_all_that_was_taken": wrong(
        ROW, "row.sum_first(gates, taken.own)", "row.sum_first(gates, taken.count)"
    ),
    "moved_slots_keep_their_weight": wrong(
        ROW, "row.get(weights, t) * share", "row.get(weights, t) + 0.0f * share"
    ),
    "coefficients_of_the_choice": wrong(WARP, "[n * n + stand_in]", "[0 * n + stand_in]"),
    "votes_are_gates": wrong(ROW, "exponent == 1 ? capped : 1.0f", "capped"),
    "raw_weights_are_never_compensated": wrong(
        ROW, "!call.renormalize && !compensates", "!call.renormalize"
    ),
    "fainter_gates_count": wrong(ROW, "kFaintest = -80.0f", "kFaintest = -85.0f"),
    "the_faintest_gate_is_0": wrong(ROW, "x >= kFaintest", "x > kFaintest"),
    "padding_names_the_next_expert": wrong(KERNELS, "[i])) - 1;", "[i]));"),
    "equal_demands_go_to_the_higher_id": wrong(
        KERNELS, "equal & ((1u << lane) - 1)", "equal & ~((2u << lane) - 1)"
    ),
    "one_expert_beyond_the_budget": wrong(
        KERNELS, "shared.wanted - count(least + 1);", "shared.wanted - count(least + 1) + 1;"
    ),
    "every_utility_is_linear": wrong(ROW, "exponent == 2 ?", "exponent == 3 ?"),
    "lost_weight_goes_to_the_first_slot": wrong(
        WARP,
        "__reduce_min_sync(kAll, candidate)",
        "candidate",
        "const unsigned nearest = __reduce_min_sync(kAll, candidate);",
    ),
    "kept_experts_pass_on_their_weight": wrong(ROW, "kept != 0 ?", "kept == ~0u ?"),
}

STATISTICS = {
    "padding_is_counted": wrong(KERNELS, " && call.policy_ids[thread] != kPad;", ";"),
    "padding_is_counted_in_two_launches": wrong(
        KERNELS, "mine += call.policy_ids[row] != kPad;", "mine += 1;"
    ),
    "free_slots_are_counted": wrong(
        ROW, "row.mark(Experts::after, ids, n);", "row.mark(Experts::after, ids, row.call().top_k);"
    ),
    "required_experts_are_critical": wrong(
        KERNELS, "after[i] & ~required[i]", "after[i] & required[i]"
    ),
}

MUTANTS = {**SYNCHRONISATION, **MEMORY, **ORDER, **POLICIES, **STATISTICS}

# The calls have at most 64 experts: a build without the kernels for more takes a third of the time.
FEWER_KERNELS = {
    "if (call.num_experts <= 128) return launch<kPacked, 4>(call, stream);": "",
    "if (call.num_experts <= 256) return launch<kPacked, 8>(call, stream);": "",
    "if (call.num_experts <= 512) return launch<kPacked, 16>(call, stream);": "",
    "return launch<kPacked, 32>(call, stream);": "return cudaErrorInvalidValue;",
}


# --- the calls ---------------------------------------------------------------------------------

N, K = 40, 4
SPECS: tuple[Spec, ...] = (
    {"kind": "vanilla"},
    {"kind": "topk", "k0": 2},
    {**OEA_2, "k0": 1},
    {**OEA_2, "k0": 1, "max_rank": 2},
    {**OEA_2, "k0": 1, "max_rank": 8},
    {**OEA_2, "k0": 1, "k_max": 3},
    {**OEA_2, "k0": 4, "p": 0.35},
    {**SERE_1, "rho": 1.0},
    {**SERE_1, "rho": -1.0, "c": 0.5},
    {**SERE_1, "rho": -1.0, "artifact": "a"},
    {**OEA_2, "k0": 1, "c": 0.5},
)


BUDGETS: tuple[Spec, ...] = (
    {"kind": "topk", "k0": 1},
    {**BUDGET_5, **MAPPED},
    {**BUDGET_5, "k0": 1, "utility": "gate"},
    {**OEA_2, **MAPPED, "k0": 1, "mapped_share": 1.0},
    {"kind": "rule", "k0": 0, "exponent": 0, "max_active": 6, "max_rank": K},
)


def mixed(num_rows: int, seed: int, dtype: torch.dtype) -> Case:
    """Rows under every policy, some padded; the similarities are quarters, so that many equal
    the threshold. Seeds: 0 is smooth, 1 has ties, 2 has special values."""
    case = varied_case((num_rows, N, K), seed)
    row_specs = tuple(None if b % 9 == 4 else (b + 1) % len(SPECS) for b in range(num_rows))
    return replace(
        case,
        scores=case.scores.to(dtype),
        specs=SPECS,
        row_specs=row_specs,
        artifacts={name: (x * 4).round() / 4 for name, x in case.artifacts.items()},
        coefficients={"a": case.artifacts["b"].abs()},
    )


def budgeted(num_rows: int, max_active: int, seed: int, dtype: torch.dtype) -> Case:
    """The first block of two launches has no budget row, all further rows are under one or map."""
    case = varied_case((num_rows, N, K), seed)
    row_specs = tuple(0 if b < 8 < num_rows - 8 else 1 + b % 4 for b in range(num_rows))
    specs = tuple(
        {**spec, "max_active": max_active} if "max_active" in spec else spec for spec in BUDGETS
    )
    case = replace(case, scores=case.scores.to(dtype), specs=specs, row_specs=row_specs)
    return keep_off_close_demands(case)


def tied(num_rows: int) -> Case:
    """Budget rows to whom all their experts are worth the same: the budget ends between equals."""
    case = varied_case((num_rows, N, K), 0)
    return replace(
        case,
        gates=torch.full_like(case.gates, 0.25),
        specs=(BUDGET_5,),
        row_specs=(0,) * num_rows,
    )


def merging(num_rows: int) -> Case:
    """Rows whose slots all move to what few neighbours load, so that many end on one expert."""
    specs: tuple[Spec, ...] = ({**SERE_1, "rho": -1.0}, {"kind": "topk", "k0": 1})
    case = varied_case((num_rows, N, K), 0)
    return replace(case, specs=specs, row_specs=tuple(int(b % 5 == 0) for b in range(num_rows)))


def faint() -> Call:
    """A budget of one expert, for which two rows have the last logit that weighs and the first that
    does not."""
    logits = torch.full((6, N), -torch.inf)
    logits[:, 0], logits[:, 1] = -20.0, 0.0
    logits[0, :2], logits[1, :2] = torch.tensor([[0.0, -80.0], [0.0, -80.5]])
    budget = Budget.model_validate({"max_active": 1, "mapped_share": 0.3})
    similarity = {"a": torch.eye(N)}
    table = build_table(
        [budget], layer=0, top_k=2, num_experts=N, similarity=similarity, artifacts=["a"]
    )
    ids = torch.tensor([[1, 0]], dtype=torch.int32).expand(6, -1).contiguous()
    return Call(logits, torch.zeros(6).int(), table, Router(), ids, torch.full((6, 2), 0.5))


def with_garbage(case: Case) -> Case:
    """Every row names an expert twice, and one that does not exist."""
    ids = case.topk_ids.clone()
    ids[:, 1], ids[:, 2] = ids[:, 0], N
    return keep_off_thresholds(replace(case, topk_ids=ids))


def stepped(case: Case) -> Call:
    """Pruning that starts at just as many live rows as there are."""
    k0 = CountSchedule(default=K, rows={len(case.live): 1})
    table = build_table([TopK(k0=k0), Vanilla()], layer=0, top_k=K, num_experts=N)
    plan = torch.tensor([-1 if index is None else index % 2 for index in case.row_specs])
    return replace(call_of(case, table=table), policy_ids=plan.int())


def repeating(call: Call) -> Call:
    return replace(call, free_slots=FreeSlots.REPEAT_FIRST)


def from_logits(case: Case) -> Call:
    """The scores taken for router logits."""
    return replace(call_of(case), router=Router(renormalize=False, scale=2.0), gates=None)


def routed(case: Case, router: Router) -> Call:
    """A call on logits that lie far enough apart."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(0, 2, case.scores.shape)).bfloat16()
    return replace(call_of(case), scores=logits, router=router, gates=None)


@cache
def calls() -> dict[str, tuple[Call, Outcome]]:
    """Every call with its outcome. The large ones come last: they are slow under TSan."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    bias = torch.linspace(-1, 1, N)
    small = {
        f"seed {seed}, {dtype}": mixed(16, seed, dtype)
        for dtype in (float32, bfloat16)
        for seed in range(3)
    }
    found = {name: call_of(case) for name, case in small.items()}
    found |= {f"logits, {name}": from_logits(case) for name, case in small.items()}
    case = small[f"seed 0, {float32}"]
    found["steps"] = stepped(case)
    found["garbage"] = call_of(with_garbage(case))
    equal = replace(case, scores=torch.zeros_like(case.scores))
    found["garbage, equal scores"] = call_of(with_garbage(equal))
    found["bias"] = routed(case, Router("sigmoid", bias=bias))
    found["groups"] = routed(case, Router(num_groups=4, top_groups=2))
    found["merging"] = call_of(merging(16))
    found["faint"] = faint()
    for name in ("merging", f"seed 1, {float32}", f"seed 1, {bfloat16}"):
        found[f"repeat first, {name}"] = repeating(found[name])
    found["tied demands"] = call_of(tied(16))
    for seed in range(3):
        dtype = (float32, bfloat16)[seed % 2]
        found[f"budget, seed {seed}"] = call_of(budgeted(16, 14, seed, dtype))
    found["two launches"] = call_of(mixed(26, 0, bfloat16))
    found["two launches, steps"] = repeating(stepped(mixed(26, 0, float32)))
    found["two launches, budget"] = call_of(budgeted(26, 25, 1, bfloat16))
    found["two launches, ample budget"] = call_of(budgeted(26, N, 1, bfloat16))
    return {name: (call, ask_reference(call)) for name, call in found.items()}


def verdict(program: Path) -> str:
    """RIGHT, or the first call whose outcome is wrong, or what the program died of."""
    driver = Driver(program)
    try:
        for name, (call, expected) in calls().items():
            try:
                got = Simulated(driver)(call)
            except AssertionError as death:
                return str(death)
            try:
                assert_agrees(got, expected)
            except AssertionError:
                return WRONG + name
    finally:
        driver.close()
    return RIGHT


# --- the builds --------------------------------------------------------------------------------


def substitute(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"found {text.count(old)} times: {old}"
    return text.replace(old, new)


def plant(mutant: Mutant, csrc: Path) -> None:
    path = csrc / mutant.file
    where = mutant.where or mutant.old
    path.write_text(substitute(path.read_text(), where, substitute(where, mutant.old, mutant.new)))


def build_mutant(name: str, flavour: Flavour, folder: Path) -> Path:
    """The driver without CPU code, built on a copy of csrc. "none" is no mutant."""
    csrc = folder / name / flavour / "csrc"
    shutil.copytree(building.CSRC, csrc)
    path = csrc / KERNELS
    for old, new in FEWER_KERNELS.items():
        path.write_text(substitute(path.read_text(), old, new))
    if name != "none":
        plant(MUTANTS[name], csrc)
    return build_driver(flavour, csrc=csrc, has_cpu=False)


PAIRS: list[tuple[str, Flavour]] = [
    *(("none", flavour) for flavour in FLAVOURS),
    *((name, flavour) for name, mutant in MUTANTS.items() for flavour in mutant.caught),
]


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, Flavour], Future[Path]]]:
    """What the selected tests need, two builds at a time."""
    reason = building.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mutants")
    selected = {item.name for item in request.session.items}
    pairs = [pair for pair in PAIRS if any("-".join(pair) in name for name in selected)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {pair: pool.submit(build_mutant, *pair, folder) for pair in pairs}


@pytest.mark.parametrize(("name", "flavour"), PAIRS)
def test_fault_is_caught(
    programs: dict[tuple[str, Flavour], Future[Path]], name: str, flavour: Flavour
) -> None:
    """The real sources pass in every build, and each fault shows where it must."""
    expected = RIGHT if name == "none" else MUTANTS[name].caught[flavour]
    assert expected in verdict(programs[name, flavour].result())
