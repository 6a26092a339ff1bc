"""A rule of another package costs what a built-in one costs; a policy in torch costs much more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch

from sglang_moe_routing.kernels import BoundLayer, choose
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
ROUTER = Router()
SHARE = 0.05
BUDGET = TOP_K + round(5 * SHARE * NUM_EXPERTS)
"""What the example's rule is at 48 rows."""

pytestmark = pytest.mark.skipif(
    not choose("cpu").is_native, reason=f"no compiled kernels: {choose('cpu').reason}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Mixed:
    """One mixed call, by the kernels and by the reference.

    Args:
        further: policies listed beside vanilla, oea and sere.
        used: rows follow the first so many policies in turn.
    """

    def __init__(self, further: Sequence[Policy], used: int) -> None:
        sere = SERE.model_validate({"num_primary": 3})
        policies: list[Policy] = [Vanilla(), OEA.model_validate({"k0": 3}), sere, *further]
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=generator)
        self.scores, self.gates = ROUTER.score(self.logits)
        weights, ids = self.gates.topk(TOP_K)
        self.base = ids.int(), weights / weights.sum(dim=1, keepdim=True)
        self.ids, self.weights = (tensor.clone() for tensor in self.base)
        self.policy_ids = (torch.arange(NUM_ROWS) % used).int()
        self.table = build_table(
            policies,
            layer=0,
            top_k=TOP_K,
            num_experts=NUM_EXPERTS,
            similarity={"a": torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=generator)},
            artifacts=[None, None, "a", *(None for _ in further)],
        )
        union = torch.empty(NUM_EXPERTS, dtype=torch.bool)
        self.layer = BoundLayer(self.table, ROUTER, union, top_k=TOP_K)

    def reset(self) -> None:
        """Take back what the kernels did in place."""
        self.ids.copy_(self.base[0])
        self.weights.copy_(self.base[1])

    def by_kernels(self) -> None:
        self.layer.reroute(self.logits, self.ids, self.weights, self.policy_ids)

    def by_reference(self) -> None:
        given = self.scores, self.gates, *self.base, self.policy_ids, self.table
        reroute(*given, renormalize=True)


def median_us(
    calls: Mapping[str, tuple[Mixed, Callable[[], None]]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Median time of each call, all measured in turn so that a disturbance meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (mixed, call) in calls.items():
            for _ in range(2):  # the first brings its data in
                mixed.reset()
                begin = time.perf_counter()
                call()
                end = time.perf_counter()
            times[name].append((end - begin) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def test_a_foreign_rule_costs_what_a_built_in_one_costs() -> None:
    """Listed or followed by rows; the built-in one beside it has the same numbers at 48 rows."""
    foreign = examples.example_class().model_validate({"share": SHARE})
    built_in = Budget.model_validate({"max_active": BUDGET})
    mixed = {
        "none": Mixed([], 3),
        "listed": Mixed([foreign], 3),
        "followed": Mixed([foreign], 4),
        "built-in": Mixed([built_in], 4),
    }
    found = median_us({name: (call, call.by_kernels) for name, call in mixed.items()})
    assert torch.equal(mixed["followed"].ids, mixed["built-in"].ids)
    assert torch.equal(mixed["listed"].ids, mixed["none"].ids)
    assert not torch.equal(mixed["followed"].ids, mixed["none"].ids)
    print({name: round(us, 1) for name, us in found.items()})
    assert found["listed"] <= 1.25 * found["none"]
    assert found["followed"] <= 1.25 * found["built-in"]


def test_the_reference_costs_many_times_more() -> None:
    """What a policy in torch does to the rows of all."""
    mixed = Mixed([], 3)
    calls = {"kernels": (mixed, mixed.by_kernels), "reference": (mixed, mixed.by_reference)}
    found = median_us(calls, rounds=ROUNDS // 10)
    print({name: round(us, 1) for name, us in found.items()})
    assert found["reference"] > 3 * found["kernels"]
