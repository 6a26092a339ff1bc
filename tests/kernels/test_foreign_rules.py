"""A rule of another package costs what a built-in one costs; a policy in torch costs much more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.kernels import choose, refine_out
from sglang_moe_routing.policies import (
    OEA,
    SERE,
    Budget,
    Policy,
    Router,
    Vanilla,
    build_table,
    reroute,
)
from tests import examples

NUM_ROWS, NUM_EXPERTS, TOP_K, ROUNDS = 48, 128, 8, 400
SHARE = 0.05
BUDGET = TOP_K + round(5 * SHARE * NUM_EXPERTS)
"""What the example's rule is at 48 rows."""

Call = Callable[[], object]

pytestmark = pytest.mark.skipif(
    not choose("cpu").is_native, reason=f"no compiled kernels: {choose('cpu').reason}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_calls(further: Sequence[Policy], used: int) -> tuple[Call, Call, Tensor]:
    """The same mixed call by the kernels and by the reference, and where the kernels leave ids.

    Args:
        further: policies listed beside vanilla, oea and sere.
        used: rows follow the first so many policies in turn.
    """
    sere = SERE.model_validate({"num_primary": 3})
    policies: list[Policy] = [Vanilla(), OEA.model_validate({"k0": 3}), sere, *further]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=generator)
    router = Router()
    scores, gates = router.score(logits)
    weights, ids = gates.topk(TOP_K)
    weights, ids = weights / weights.sum(dim=1, keepdim=True), ids.int()
    policy_ids = (torch.arange(NUM_ROWS) % used).int()
    table = build_table(
        policies,
        layer=0,
        top_k=TOP_K,
        num_experts=NUM_EXPERTS,
        similarity={"a": torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=generator)},
        artifacts=[None, None, "a", *(None for _ in further)],
    )
    out_ids, out_weights = torch.empty_like(ids), torch.empty_like(weights)
    out_union = torch.empty(NUM_EXPERTS, dtype=torch.bool)
    out = {"out_ids": out_ids, "out_weights": out_weights, "out_union": out_union}
    return (
        lambda: refine_out(logits, ids, weights, policy_ids, table, router, **out),
        lambda: reroute(scores, gates, ids, weights, policy_ids, table, renormalize=True),
        out_ids,
    )


def median_us(calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each call, all measured in turn so that a disturbance meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # brings its data in
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def test_a_foreign_rule_costs_what_a_built_in_one_costs() -> None:
    """Listed or followed by rows; the built-in one beside it has the same numbers at 48 rows."""
    foreign = examples.example_class().model_validate({"share": SHARE})
    built_in = Budget.model_validate({"max_active": BUDGET})
    calls, ids = {}, {}
    for name, further, used in (
        ("none", [], 3),
        ("listed", [foreign], 3),
        ("followed", [foreign], 4),
        ("built-in", [built_in], 4),
    ):
        calls[name], _, ids[name] = make_calls(further, used)
    found = median_us(calls)
    assert torch.equal(ids["followed"], ids["built-in"])
    assert torch.equal(ids["listed"], ids["none"])
    print({name: round(us, 1) for name, us in found.items()})
    assert found["listed"] <= 1.25 * found["none"]
    assert found["followed"] <= 1.25 * found["built-in"]


def test_the_reference_costs_many_times_more() -> None:
    """What a policy in torch does to the rows of all."""
    kernels, reference, _ = make_calls([], 3)
    found = median_us({"kernels": kernels, "reference": reference}, rounds=ROUNDS // 10)
    print({name: round(us, 1) for name, us in found.items()})
    assert found["reference"] > 3 * found["kernels"]
