"""What the kernels are told once per layer stays true when tables and biases change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("sglang")
from sglang_moe_routing.integration import reloading
from sglang_moe_routing.integration.hooks.model import topk as hook
from sglang_moe_routing.integration.marks import LAYER
from sglang_moe_routing.kernels import choose
from sglang_moe_routing.policies import FREE, Router, Sizes, TorchPolicy, with_capacity
from sglang_moe_routing.runtime import Plan, Process, process
from sglang_moe_routing.runtime.definitions import make_table

from .test_isolation import IMPLEMENTATIONS, NUM_EXPERTS, TOP_K, make_runtime

NUM_ROWS = 3
OEA = 1  # keeps 2 experts of a row by itself


@pytest.fixture(params=IMPLEMENTATIONS)
def runtime(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Process:
    runtime = make_runtime(tmp_path, 1, request.param)
    monkeypatch.setattr(process, "_current", runtime)
    return runtime


def ask(
    runtime: Process, bias: Tensor | None = None, shared: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and weights of one call of SGLang's router, one row under `OEA`."""
    logits = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(NUM_ROWS * (TOP_K + shared)).view(NUM_ROWS, -1).int() % NUM_EXPERTS
    weights = torch.ones(ids.shape)
    config = SimpleNamespace(correction_bias=bias, **{LAYER: runtime.model.layers[0]})
    policies = [OEA] + [0] * (NUM_ROWS - 1)
    plan = Plan(policies, [0] * NUM_ROWS, [""] * NUM_ROWS, "DECODE", is_decode=True)
    with runtime.model.forward(plan):
        hook.before(ids, weights, config, logits)
    return logits, ids, weights


@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_reload_is_in_force_at_once(
    runtime: Process, monkeypatch: pytest.MonkeyPatch, has_graphs: bool
) -> None:
    """Bound anew, or where graphs hold the tensors, written into them."""
    monkeypatch.setattr(runtime.model, "has_graphs", has_graphs)
    _, before, _ = ask(runtime)
    layer = runtime.model.layers[0]
    definitions = [replace(d, policy=runtime.ids.table[0].policy) for d in runtime.ids.table]
    vanilla = make_table(definitions, 0, Sizes(TOP_K, NUM_EXPERTS))
    if has_graphs:
        vanilla = with_capacity(vanilla, layer.table.capacity)
    staged = SimpleNamespace(
        layers=[(layer, vanilla)],
        loaded=runtime.loaded,
        artifacts=runtime.artifacts,
        table=None,
    )
    reloading._commit(runtime, staged)
    _, after, _ = ask(runtime)
    assert before[0].ne(after[0]).any()
    assert after.flatten().tolist() == list(range(NUM_ROWS * TOP_K))


class Plain(TorchPolicy):
    kind: Literal["plain"] = "plain"


@pytest.mark.skipif(not choose("cpu").is_native, reason="no compiled kernels")
def test_a_reload_says_what_re_routes_from_now_on(tmp_path: Path) -> None:
    """A policy in torch comes and goes: the kernels idle meanwhile, and the state says so."""
    runtime = make_runtime(tmp_path, 1, "native")
    with_torch = [*runtime.ids.table[:-1], replace(runtime.ids.table[-1], policy=Plain())]
    reference = "torch reference: policies of kind plain are written in torch"
    for definitions, expected in (
        (with_torch, reference),
        (runtime.ids.table, choose("cpu").name),
    ):
        layer = runtime.model.layers[0]
        table = make_table(definitions, 0, Sizes(TOP_K, NUM_EXPERTS))
        staged = SimpleNamespace(
            layers=[(layer, table)],
            loaded=runtime.loaded,
            artifacts=runtime.artifacts,
            table=None,
        )
        reloading._commit(runtime, staged)
        assert runtime.model.kernels == expected
        assert (layer.kernels is None) == (expected == reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_now_ranks(runtime: Process, dtype: torch.dtype) -> None:
    """An update of the weights writes into the router's bias, replaces what it holds, or it."""
    bias = torch.zeros(NUM_EXPERTS, dtype=dtype)
    layer = runtime.model.layers[0]
    layer.router = Router("sigmoid", bias=bias)

    def best() -> set[int]:
        _, ids, _ = ask(runtime, bias)
        return set(ids[0].tolist()) - {FREE}

    def favour(experts: tuple[int, ...]) -> Tensor:
        return torch.zeros(NUM_EXPERTS, dtype=dtype).index_fill_(0, torch.tensor(experts), 9.0)

    assert not {2, 3} <= best() or not {1, 2} <= best()
    bias.copy_(favour((2, 3)))
    assert {2, 3} <= best()
    bias.data = favour((1, 2))
    assert {1, 2} <= best()
    bias = favour((0, 3))
    assert {0, 3} <= best()


def test_columns_of_shared_experts_stay(runtime: Process) -> None:
    _, ids, weights = ask(runtime, shared=2)
    columns = torch.arange(NUM_ROWS * (TOP_K + 2)).view(NUM_ROWS, -1)
    assert torch.equal(ids[:, TOP_K:], columns[:, TOP_K:].int())
    assert weights[:, TOP_K:].eq(1.0).all()
    assert ids[0, :TOP_K].ne(columns[0, :TOP_K]).any()


def test_the_kernels_serve_where_they_can(runtime: Process) -> None:
    (layer,) = runtime.model.layers
    assert (layer.kernels is not None) == layer.has_kernels
    assert choose("cpu").is_native or layer.kernels is None
