"""The compiled kernels on a CUDA device, captured in graphs as the server does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.kernels import BoundLayer, workspace
from sglang_moe_routing.policies import (
    OEA,
    PAD,
    SERE,
    Budget,
    Policy,
    PolicyTable,
    Rerouted,
    Router,
    TopK,
    Vanilla,
    build_table,
    reroute,
)
from tests.cases import (
    BUDGET_5,
    OEA_2,
    ROUTER_DEMAND_RTOL,
    SERE_1,
    Case,
    Spec,
    keep_off_close_demands,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES: list[Policy] = [
    Vanilla(),
    TopK.model_validate({"k0": 3}),
    OEA.model_validate({"k0": {"default": 3, "rows": {4: 2}}, "max_rank": 32}),
    SERE.model_validate({"num_primary": 2, "threshold": 0.3}),
    OEA.model_validate({"k0": 2, "mapped_share": 0.3}),
    SERE.model_validate({"num_primary": 1, "threshold": -1.0}),  # with coefficients
    OEA.model_validate({"k0": 1, "compensation": 0.6}),
    Budget.model_validate({"max_active": 40}),
    Budget.model_validate({"max_active": 36, "k0": 1, "utility": "gate", "mapped_share": 1.0}),
]
ARTIFACTS = [None, None, None, "a", "a", "b", None, None, "a"]
NUM_BUDGETS = 2  # the last ones
ROUTERS = {
    "softmax": Router(),
    "sigmoid": Router(scoring="sigmoid"),
    "groups": Router(num_groups=8, top_groups=3, renormalize=False, scale=16.0),
}
NUM_EXPERTS, TOP_K = 128, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = {"rtol": 1e-5, "atol": 1e-7}  # exponentials and sums round differently per device


def specs_of(num_live: int) -> tuple[Spec, ...]:
    """The policies as tests/cases.py has them, as far as U depends on them."""
    return (
        {"kind": "vanilla"},
        {"kind": "topk", "k0": 3},
        {**OEA_2, "k0": 3 if num_live < 4 else 2},
        {**SERE_1, "num_primary": 2},
        OEA_2,
        {**BUDGET_5, "max_active": 40},
        {**BUDGET_5, "max_active": 36, "k0": 1, "utility": "gate"},
    )


@dataclass
class Buffers:
    """Static tensors of a captured call, which writes into `topk_ids` and `topk_weights`."""

    logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    policy_ids: Tensor
    union: Tensor
    statistics: Tensor

    @classmethod
    def of(cls, num_rows: int, dtype: torch.dtype) -> Buffers:
        shape = (num_rows, TOP_K)
        return cls(
            logits=torch.zeros(num_rows, NUM_EXPERTS, dtype=dtype, device="cuda"),
            topk_ids=torch.zeros(shape, dtype=torch.int32, device="cuda"),
            topk_weights=torch.zeros(shape, device="cuda"),
            policy_ids=torch.full((num_rows,), PAD, dtype=torch.int32, device="cuda"),
            union=torch.empty(NUM_EXPERTS, dtype=torch.bool, device="cuda"),
            statistics=torch.zeros(1, 6, dtype=torch.int64, device="cuda"),
        )

    def bind(self, table: PolicyTable, router: Router) -> Callable[[], None]:
        layer = BoundLayer(
            table,
            router,
            self.union,
            top_k=TOP_K,
            statistics=self.statistics,
            workspace=workspace("cuda"),
        )
        choice = (self.topk_ids, self.topk_weights, self.policy_ids)
        return partial(layer.reroute, self.logits, *choice, part=0)

    def fill(self, seed: int, router: Router) -> None:
        """New logits, the router's choice, new policies, and another number of live rows. With odd
        seeds all rows follow a budget."""
        self._fill(seed, router)
        while self._is_close(router):
            seed += 1000
            self._fill(seed, router)

    def _fill(self, seed: int, router: Router) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_rows = len(self.policy_ids)
        grid = torch.randint(-40, 40, self.logits.shape, generator=generator) / 16  # ties
        scores, gates = router.score(grid)
        ids = scores.argsort(dim=1, descending=True, stable=True)[:, :TOP_K]
        weights = gates.gather(1, ids)
        if router.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        policy_ids = torch.randint(0, len(POLICIES), (num_rows,), generator=generator)
        if seed % 2 == 1:
            policy_ids = len(POLICIES) - 1 - policy_ids % NUM_BUDGETS
        num_live = int(torch.randint(0, num_rows + 1, (), generator=generator))
        policy_ids[num_live:] = PAD
        self.logits.copy_(grid)
        self.topk_ids.copy_(ids)
        self.topk_weights.copy_(weights * router.scale)
        self.policy_ids.copy_(policy_ids)

    def _is_close(self, router: Router) -> bool:
        """Whether rounding decides which expert is the last that a budget lets in."""
        ids, policy_ids = self.topk_ids.cpu(), self.policy_ids.tolist()
        scores, gates = router.score(self.logits.cpu().float(), ids)
        rows = tuple(None if index == PAD else index for index in policy_ids)
        specs = specs_of(sum(index is not None for index in rows))
        case = Case(scores, gates, ids, self.topk_weights.cpu(), specs, rows, {})
        return keep_off_close_demands(case, ROUTER_DEMAND_RTOL).specs != specs

    def expected(self, table: PolicyTable, router: Router) -> Rerouted:
        logits, ids = self.logits.cpu(), self.topk_ids.cpu()
        scores, gates = router.score(logits, ids)
        return reroute(
            scores,
            gates,
            ids,
            self.topk_weights.cpu(),
            self.policy_ids.cpu(),
            table,
            renormalize=router.renormalize,
            scale=router.scale,
        )

    def check(self, expected: Rerouted) -> None:
        assert torch.equal(self.topk_ids.cpu(), expected.topk_ids)
        assert torch.equal(self.union.cpu(), expected.union)
        torch.testing.assert_close(self.topk_weights.cpu(), expected.topk_weights, **WEIGHTS)


def make_tables() -> tuple[PolicyTable, PolicyTable]:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(NUM_EXPERTS, NUM_EXPERTS, generator=generator)
    table = build_table(
        POLICIES,
        layer=0,
        top_k=TOP_K,
        num_experts=NUM_EXPERTS,
        similarity={"a": similarity, "b": similarity.T},
        coefficients={"b": similarity},
        artifacts=ARTIFACTS,
    )
    return table, table.to("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 65, 200, 1500])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_captured_call_follows_new_rows_and_policies(
    num_rows: int, name: str, dtype: str
) -> None:
    """Static buffers, new contents, no Python at replay; one launch and two."""
    router = ROUTERS[name]
    table, kernel_table = make_tables()
    buffers = Buffers.of(num_rows, DTYPES[dtype])

    call = buffers.bind(kernel_table, router)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # loads the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    buffers.statistics.zero_()
    totals = torch.zeros(6, dtype=torch.int64)
    for seed in range(6):
        buffers.fill(seed, router)
        expected = buffers.expected(table, router)
        graph.replay()
        torch.cuda.synchronize()
        buffers.check(expected)
        num_live = (buffers.policy_ids != PAD).sum().cpu()
        counts = (expected.active, expected.active_base, expected.moved_slots, expected.critical)
        totals += torch.stack([(num_live > 0).long(), num_live, *counts])
    assert buffers.statistics[0].tolist() == totals.tolist()


def test_a_rewritten_table_takes_effect_without_a_new_capture() -> None:
    """What a reload does: the graph reads the table's contents at every replay."""
    router = ROUTERS["softmax"]
    _, kernel_table = make_tables()
    buffers = Buffers.of(16, torch.bfloat16)
    buffers.fill(3, router)
    buffers.policy_ids.fill_(1)
    call = buffers.bind(kernel_table, router)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for kept in (3, 5, 1):
        buffers.fill(3, router)
        buffers.policy_ids.fill_(1)
        kernel_table.words[1, :, 1] = kept
        graph.replay()
        torch.cuda.synchronize()
        assert ((buffers.topk_weights > 0).sum(dim=1) == kept).all()
