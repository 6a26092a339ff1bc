"""Final rows of every policy on the MoE kernels of the engine itself, against a loop over experts.

The kernels run in Triton's interpreter (engine_kernels.py). What can be run on a GPU only is held
to the rule that its source states.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sglang_moe_routing.policies import (
    OEA,
    SERE,
    Budget,
    FreeSlots,
    Policy,
    Router,
    TopK,
    Vanilla,
    build_table,
    reroute,
)

pytest.importorskip("sglang")
from sglang_moe_routing.integration.runners import RUNNERS

ROWS = (1, 4, 16, 129, 250)
POLICIES: dict[str, Policy] = {
    "vanilla": Vanilla(),
    "topk 1": TopK(k0=1),
    "topk 3": TopK(k0=3),
    "oea 1": OEA(k0=1),
    "oea 3": OEA(k0=3),
    "budget": Budget(max_active=4),
    "sere 1": SERE(num_primary=1, threshold=0.0),
    "sere 2": SERE(num_primary=2, threshold=0.0),
}
BATCHES: dict[str, list[Policy]] = {
    **{name: [policy] for name, policy in POLICIES.items()},
    "mixed": list(POLICIES.values()),
}
HIDDEN, INTERMEDIATE = 16, 16

LARGE, SMALL = (128, 8), (32, 4)
"""Experts and experts per token. The interpreter aligns 1,024 slots at most: 250 rows of 4."""
CASES = [(name, num_rows, LARGE) for name in BATCHES for num_rows in ROWS]
LAYERS = [
    (name, num_rows, SMALL)
    for name in BATCHES
    for num_rows in ROWS
    if num_rows <= 16 or name == "mixed"  # a layer takes the interpreter long
]

TRITON = FreeSlots.IGNORED if RUNNERS["triton"].skips_free else FreeSlots.REPEAT_FIRST
"""What stands in free slots for SGLang's Triton kernels; another id in an older release."""

FLOAT16 = 2.0**-11
"""Of one rounding to float16, relative."""


Case = tuple[str, int, tuple[int, int]]
"""Name of a batch, rows, shape."""


def final_rows(case: Case, free_slots: FreeSlots = FreeSlots.IGNORED) -> tuple[Tensor, Tensor]:
    """int32 ids and float32 weights ``[num_rows, top_k]``; some experts are far more popular."""
    name, num_rows, shape = case
    policies = BATCHES[name]
    num_experts, top_k = shape
    generator = torch.Generator().manual_seed(num_rows)
    popular = torch.linspace(2, 0, num_experts)
    logits = torch.randn(num_rows, num_experts, generator=generator) + popular
    similarity = torch.rand(num_experts, num_experts, generator=generator)
    scores, gates = Router().score(logits)
    weights, ids = gates.topk(top_k)
    weights = weights / weights.sum(dim=1, keepdim=True)
    table = build_table(
        [Vanilla(), *policies],
        layer=0,
        top_k=top_k,
        num_experts=num_experts,
        similarity={"a": similarity.fill_diagonal_(1)},
        artifacts=[None, *("a" for _ in policies)],
    )
    policy_ids = 1 + torch.arange(num_rows, dtype=torch.int32) % len(policies)
    final = reroute(
        scores, gates, ids, weights, policy_ids, table, renormalize=True, free_slots=free_slots
    )
    return final.topk_ids.int(), final.topk_weights


def make_call(case: Case) -> dict[str, Any]:
    (ids, weights), (_, num_rows, shape) = final_rows(case), case
    call: dict[str, Any] = {"ids": ids, "weights": weights, "num_experts": shape[0]}
    if shape is SMALL:
        generator = torch.Generator().manual_seed(1)
        sizes = {
            "x": (num_rows, HIDDEN),
            "w13": (shape[0], 2 * INTERMEDIATE, HIDDEN),
            "w2": (shape[0], HIDDEN, INTERMEDIATE),
        }
        # float16, because the interpreter cannot multiply bfloat16
        call["triton_ids"], _ = final_rows(case, TRITON)
        call |= {n: torch.randn(*s, generator=generator).half() / 4 for n, s in sizes.items()}
    return call


Ran = dict[Case, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """By case: the call, and what the kernels made of it."""
    folder = tmp_path_factory.mktemp("kernels")
    calls = {case: make_call(case) for case in CASES + LAYERS}
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-m", "tests.integration.engine_kernels"]
    files = [str(folder / "calls.pt"), str(folder / "results.pt")]
    subprocess.run([*command, *files], check=True, cwd=Path(__file__).parents[2])
    results = torch.load(folder / "results.pt")
    return {case: (calls[case], results[case]) for case in calls}


@pytest.mark.parametrize("case", CASES + LAYERS, ids=str)
def test_deep_gemm_gives_every_slot_a_row_of_its_expert(ran: Ran, case: Case) -> None:
    """Its kernel lays down that an expert has at most as many slots as the batch has rows."""
    call, result = ran[case]
    places, live = result["places"], call["ids"] >= 0
    assert int(result["counts"].max()) <= case[1]
    assert torch.equal(places[live] // result["num_places"], call["ids"][live])
    assert places[live].unique().numel() == int(live.sum())
    assert (places[~live] == -1).all()


@pytest.mark.parametrize("case", [case for case in CASES if case[1] <= 4], ids=str)
def test_block_alignment_places_every_slot_once_and_free_ones_in_blocks_that_are_skipped(
    ran: Ran, case: Case
) -> None:
    call, result = ran[case]
    ids, found = call["ids"].flatten().tolist(), {}
    for expert, slots in zip(result["experts"].tolist(), result["slots"].tolist(), strict=True):
        for slot in slots:
            if slot < len(ids):
                assert slot not in found
                found[slot] = expert
    assert found == dict(enumerate(ids))


def loop_over_experts(call: dict[str, Any]) -> Tensor:
    """``[num_rows, HIDDEN]`` in float64."""
    x, out = call["x"].double(), torch.zeros(call["x"].shape, dtype=torch.float64)
    for expert in call["ids"].unique().tolist():
        if expert < 0:
            continue
        weights = torch.where(call["ids"] == expert, call["weights"], 0.0).sum(dim=1, keepdim=True)
        gate, up = functional.linear(x, call["w13"][expert].double()).chunk(2, dim=-1)
        inner = functional.silu(gate) * up
        out += weights * functional.linear(inner, call["w2"][expert].double())
    return out


@pytest.mark.parametrize("kernel", ["triton", "deep_gemm"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer_adds_up_its_experts(ran: Ran, case: Case, kernel: str) -> None:
    call, result = ran[case]
    # six numbers are rounded to float16 on the way: both halves of the first product, their
    # activation, the second product, its weighted value, and the sum
    torch.testing.assert_close(
        result[kernel].double(),
        loop_over_experts(call),
        rtol=6 * FLOAT16,
        atol=6 * FLOAT16 * float(call["x"].abs().max()),
    )


@pytest.mark.parametrize("case", CASES + LAYERS, ids=str)
def test_no_row_names_an_expert_twice(case: Case) -> None:
    """The rule of FlashInfer's TRT-LLM routing, where one of two such slots wins, and of its
    CUTLASS one, whose map ends at the first."""
    ids, weights = final_rows(case)
    for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        live = [expert for expert in row if expert >= 0]
        assert len(live) == len(set(live))
        assert all(
            weight == 0 for expert, weight in zip(row, row_weights, strict=True) if expert < 0
        )
