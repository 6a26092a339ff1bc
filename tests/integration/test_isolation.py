"""Isolation groups: rows are routed as if the rows of other groups were not there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_moe_routing.artifacts import SimilarityArtifact
from sglang_moe_routing.config import load_config
from sglang_moe_routing.kernels import choose
from sglang_moe_routing.policies import FREE, FreeSlots, Router, Sizes
from sglang_moe_routing.runtime import Layer, Plan, Process, ServedModel
from sglang_moe_routing.runtime.definitions import make_table

NUM_EXPERTS, TOP_K, MAX_ROWS = 32, 4, 24
CPU = torch.device("cpu")
ARTIFACT = SimilarityArtifact(
    matrices={0: torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))},
    metric="cosine",
    model="test",
    sha256="a" * 64,
)
POLICIES = """
  oea: {kind: oea, k0: 2}
  sere: {kind: sere, num_primary: 1, threshold: 0.4}
  budget: {kind: budget, max_active: 5}
  late: {kind: topk, k0: 1, engage: {min_rows: 4}}
"""
NUM_POLICIES = 5
IMPLEMENTATIONS = ["torch", *(["native"] if choose("cpu").is_native else [])]


def make_runtime(
    folder: Path,
    num_groups: int,
    implementation: str,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> Process:
    """A runtime with one layer, as a scheduler has it after its model is loaded."""
    groups = ", ".join(
        f"{name}: g{i}" for i, name in enumerate(("oea", "sere", "late")[: num_groups - 1])
    )
    path = folder / f"{num_groups}.yaml"
    path.write_text(
        f"version: 1\nsimilarity: {{a: x}}\nisolation: {{policies: {{{groups}}}}}\n"
        f"policies: {POLICIES}"
    )
    runtime = Process(load_config(path), {"a": ARTIFACT})
    table = make_table(runtime.ids.table, 0, Sizes(TOP_K, NUM_EXPERTS))
    layer = Layer(
        layer_id=0,
        index=0,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        router=Router(),
        free_slots=free_slots,
        table=table,
        has_kernels=implementation == "native",
        union=torch.zeros(NUM_EXPERTS, dtype=torch.bool),
    )
    runtime.served = ServedModel(
        [layer],
        runtime.ids.table,
        CPU,
        MAX_ROWS,
        implementation=choose("cpu"),
        num_groups=num_groups,
    )
    return runtime


def run(
    runtime: Process, logits: Tensor, policies: Sequence[int], groups: Sequence[int], pads: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids and weights of one decode call; `pads` rows have no request."""
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    ids = ids.int()
    plan = Plan(policies, groups, [""] * len(policies), "DECODE", is_decode=True)
    assert len(logits) == len(policies) + pads
    with runtime.model.forward(plan):
        runtime.model.reroute(runtime.model.layers[0], ids, weights, logits)
    return ids, weights


@pytest.fixture(scope="module", params=itertools.product(IMPLEMENTATIONS, FreeSlots), ids=str)
def runtimes(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Process, Process]:
    """One with a single group, one with four."""
    folder = tmp_path_factory.mktemp("config")
    return make_runtime(folder, 1, *request.param), make_runtime(folder, 4, *request.param)


rows = st.lists(
    st.tuples(st.integers(0, NUM_POLICIES - 1), st.integers(0, 3)), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=150)
@given(rows=rows, pads=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_each_group_is_routed_as_if_alone(
    runtimes: tuple[Process, Process], rows: list[tuple[int, int]], pads: int, seed: int
) -> None:
    alone, isolated = runtimes
    policies, groups = [p for p, _ in rows], [g for _, g in rows]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows) + pads, NUM_EXPERTS, generator=generator)
    if seed % 2:
        logits = logits.round()  # ties
    before = isolated.model.statistics.read()
    ids, weights = run(isolated, logits, policies, groups, pads)
    for group in set(groups):
        mine = [b for b, g in enumerate(groups) if g == group]
        own_ids, own_weights = run(
            alone, logits[mine], [policies[b] for b in mine], [0] * len(mine)
        )
        assert torch.equal(ids[mine], own_ids)
        assert torch.equal(weights[mine], own_weights)
    live = len(rows)
    assert not weights[live:].any()
    held = set(ids[:live].flatten().tolist()) - {FREE}
    is_ignored = isolated.model.layers[0].free_slots is FreeSlots.IGNORED
    assert set(ids[live:].flatten().tolist()) <= ({FREE} if is_ignored else held)
    check_statistics(before, isolated.model.statistics.read(), logits[:live], ids[:live])


def check_statistics(
    before: list[dict[str, int]], after: list[dict[str, int]], logits: Tensor, ids: Tensor
) -> None:
    base = logits.softmax(dim=1).topk(TOP_K).indices
    counted = {name: value - before[0][name] for name, value in after[0].items()}
    kept = (base[:, :, None] == ids[:, None]).any(dim=2)
    expected = {
        "layer": 0,
        "calls": 1,
        "rows": len(ids),
        "active_experts": len(ids[ids != FREE].unique()),
        "active_experts_base": len(base.unique()),
        "moved_slots": int((~kept).sum()),
    }
    assert expected.items() <= counted.items()


def test_others_change_nothing(runtimes: tuple[Process, Process]) -> None:
    """Neither the tokens nor the policies, nor the number, of another group's rows."""
    _, isolated = runtimes
    mine = torch.randn(6, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for seed, num_others, policy in ((2, 1, 1), (3, 14, 2), (4, 8, 0)):
        others = torch.randn(num_others, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
        policies = [1, 2, 3, 4, 0, 1] + [policy] * num_others
        groups = [1] * 6 + [2] * num_others
        ids, weights = run(isolated, torch.cat([mine, others]), policies, groups)
        outcomes.append((ids[:6], weights[:6]))
    for ids, weights in outcomes[1:]:
        assert torch.equal(ids, outcomes[0][0])
        assert torch.equal(weights, outcomes[0][1])


def test_without_groups_they_would(runtimes: tuple[Process, Process]) -> None:
    """The same rows in one group do influence each other: the test above can fail."""
    _, isolated = runtimes
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(6, NUM_EXPERTS, generator=generator)
    others = torch.randn(14, NUM_EXPERTS, generator=generator)
    alone, _ = run(isolated, mine, [1] * 6, [1] * 6)
    together, _ = run(isolated, torch.cat([mine, others]), [1] * 20, [1] * 20)
    assert not torch.equal(alone, together[:6])


def test_a_replay_finds_the_group_of_every_row(
    runtimes: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph has baked reads groups from the buffers alone, those of padded rows too."""
    _, isolated = runtimes
    logits = torch.randn(8, NUM_EXPERTS, generator=torch.Generator().manual_seed(5))

    def replay() -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(dim=1).topk(TOP_K)
        ids = ids.int()
        with isolated.model.as_captured():
            isolated.model.reroute(isolated.model.layers[0], ids, weights, logits)
        return ids, weights

    replay()  # as when it is captured
    monkeypatch.setattr(isolated.model, "has_graphs", True)
    for policies, groups in (
        ([1, 2, 3, 0, 1, 2], [0, 1, 1, 2, 3, 3]),
        ([1, 4], [3, 0]),
        ([2], [2]),
        ([0, 2, 1, 1, 3], [1, 1, 2, 0, 1]),
    ):
        pads = len(logits) - len(policies)
        expected = run(isolated, logits, policies, groups, pads)
        plan = Plan(policies, groups, [""] * len(policies), "DECODE", is_decode=True)
        with isolated.model.forward(plan):
            assert all(map(torch.equal, replay(), expected))
