"""Steps of vanilla rows are counted many at a time, or call by call as on a GPU, and exactly."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.runtime import Plan, Process
from sglang_moe_routing.runtime.statistics import Statistics

from .test_isolation import IMPLEMENTATIONS, NUM_EXPERTS, TOP_K, make_runtime

NUM_STEPS = 300


CASES = [(i, n, defers) for i in IMPLEMENTATIONS for n in (1, 4) for defers in (True, False)]


@pytest.fixture(params=CASES, ids=str)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Process:
    implementation, num_groups, defers = request.param
    runtime = make_runtime(tmp_path, num_groups, implementation)
    runtime.model.statistics.defers = defers
    return runtime


def step(runtime: Process, num_rows: int, shared: int = 0, policy: int = 0) -> Tensor:
    """A decode step of one layer; the experts that the router chose, ``[num_rows, TOP_K]``."""
    logits = torch.randn(num_rows, NUM_EXPERTS)
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    columns = torch.full((num_rows, shared), NUM_EXPERTS)
    ids = torch.cat([ids, columns], dim=1).int()
    weights = torch.cat([weights, torch.ones_like(columns)], dim=1)
    before = ids.clone(), weights.clone()
    plan = Plan([policy] * num_rows, [0] * num_rows, [""] * num_rows, "DECODE", is_decode=True)
    with runtime.model.forward(plan):
        runtime.model.reroute(runtime.model.layers[0], ids, weights, logits)
    if policy == 0:
        assert all(map(torch.equal, (ids, weights), before))
    return before[0][:, :TOP_K]


def test_vanilla_steps_are_counted_exactly(runtime: Process) -> None:
    """With shared experts beside the routed ones, and readings in between."""
    calls = rows = active = 0
    for number in range(NUM_STEPS):
        ids = step(runtime, 1 + number % 7, shared=number % 2)
        calls, rows, active = calls + 1, rows + len(ids), active + len(ids.unique())
        if number % 97 == 0 or number == NUM_STEPS - 1:
            (counted,) = runtime.model.statistics.read()
            assert counted == {
                "layer": 0,
                "calls": calls,
                "rows": rows,
                "active_experts": active,
                "active_experts_base": active,
                "moved_slots": 0,
                "critical_experts": 0,
            }


def test_vanilla_and_other_steps_add_up(runtime: Process) -> None:
    base = [step(runtime, 5, policy=number % 2) for number in range(20)]
    (counted,) = runtime.model.statistics.read()
    assert (counted["calls"], counted["rows"]) == (20, 100)
    assert counted["active_experts_base"] == sum(len(ids.unique()) for ids in base)
    assert counted["active_experts"] < counted["active_experts_base"]


def test_calls_with_which_graphs_are_captured_do_not_count(runtime: Process) -> None:
    """Graphs may be captured anew while the server runs: what was counted before stays."""
    for number in range(4):
        step(runtime, 5, policy=number % 2)
    before = runtime.model.statistics.read()
    with runtime.model.capture(), runtime.model.graph_forward("a graph"):
        for layer in runtime.model.layers:
            weights, ids = torch.randn(3, NUM_EXPERTS).softmax(dim=1).topk(TOP_K)
            runtime.model.reroute(layer, ids.int(), weights, torch.randn(3, NUM_EXPERTS))
    assert runtime.model.statistics.read() == before


def test_another_thread_may_read_meanwhile(runtime: Process) -> None:
    """As that of the metrics does: counts never fall, and none is lost."""
    seen: list[int] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            seen.append(runtime.model.statistics.read()[0]["calls"])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(500):
        step(runtime, 2)
    is_over.set()
    reader.join()
    assert seen == sorted(seen)
    assert runtime.model.statistics.read()[0]["calls"] == 500


def test_a_vanilla_step_with_other_router_logits_is_an_error(runtime: Process) -> None:
    """It must not wait for the first request under a policy."""
    ids = torch.zeros(3, TOP_K, dtype=torch.int32)
    plan = Plan([0] * 3, [0] * 3, [""] * 3, "DECODE", is_decode=True)
    (layer,) = runtime.model.layers
    with runtime.model.forward(plan), pytest.raises(EngineError, match="router logits have shape"):
        runtime.model.reroute(layer, ids, torch.ones(3, TOP_K), torch.empty(0, NUM_EXPERTS))


def test_a_slot_without_expert_counts_none() -> None:
    statistics = Statistics([(0, 2)], torch.device("cpu"), num_experts=4)
    statistics.count_vanilla([(0, torch.tensor([[0, -1], [2, 0]]))])
    assert statistics.read()[0]["active_experts"] == 2
