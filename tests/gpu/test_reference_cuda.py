"""The plain-torch reference on a CUDA device: equal to the CPU, and safe to capture in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.policies import (
    OEA,
    PAD,
    SERE,
    Policy,
    PolicyTable,
    Rerouted,
    Router,
    TopK,
    Vanilla,
    build_table,
    reroute,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES: list[Policy] = [
    Vanilla(),
    TopK.model_validate({"k0": 3}),
    OEA.model_validate({"k0": {"default": 3, "rows": {4: 2}}, "p": 0.9, "max_rank": 32}),
    SERE.model_validate({"num_primary": 2, "threshold": 0.3}),
]
WEIGHTS = {"rtol": 1e-5, "atol": 1e-7}  # exponentials and sums round differently per device


def make_case(num_tokens: int, num_experts: int, top_k: int, seed: int) -> dict[str, Any]:
    """Inputs of one call on the CPU; logits on a grid, so that ties occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 40, (num_tokens, num_experts), generator=generator) / 16
    scores, gates = Router().score(logits)
    ids = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = gates.gather(1, ids)
    similarity = torch.rand(num_experts, num_experts, generator=generator)
    return {
        "scores": scores,
        "gates": gates,
        "topk_ids": ids.int(),
        "topk_weights": weights / weights.sum(dim=1, keepdim=True),
        "policy_ids": torch.randint(PAD, len(POLICIES), (num_tokens,), generator=generator).int(),
        "similarity": similarity,
    }


def run(case: dict[str, Any], device: str) -> Rerouted:
    tensors = {k: v.to(device) for k, v in case.items() if k != "similarity"}
    return reroute(**tensors, table=make_table(case, device), renormalize=True)


def make_table(case: dict[str, Any], device: str) -> PolicyTable:
    return build_table(
        POLICIES,
        layer=0,
        top_k=case["topk_ids"].shape[1],
        num_experts=case["scores"].shape[1],
        similarity={"a": case["similarity"]},
        artifacts=[None, None, None, "a"],
        device=device,
    )


def check_equal(found: Rerouted, expected: Rerouted) -> None:
    assert torch.equal(found.topk_ids.cpu(), expected.topk_ids)
    assert torch.equal(found.union.cpu(), expected.union)
    assert found.active.item() == expected.active.item()
    assert found.active_base.item() == expected.active_base.item()
    torch.testing.assert_close(found.topk_weights.cpu(), expected.topk_weights, **WEIGHTS)


@pytest.mark.parametrize(
    "shape", [(1, 40, 3), (16, 128, 8), (33, 60, 4), (64, 256, 8), (5, 512, 10)]
)
@pytest.mark.parametrize("seed", range(5))
def test_cuda_equals_cpu(shape: tuple[int, int, int], seed: int) -> None:
    case = make_case(*shape, seed)
    check_equal(run(case, "cuda"), run(case, "cpu"))


def test_call_can_be_captured_and_replayed_under_other_policies() -> None:
    """What a decode graph does: static buffers, new contents, no Python at replay."""
    case = make_case(16, 128, 8, seed=0)
    static: dict[str, Tensor] = {k: v.cuda() for k, v in case.items() if k != "similarity"}
    table = make_table(case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reroute(**static, table=table, renormalize=True)  # warm-up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = reroute(**static, table=table, renormalize=True)
    for seed in range(1, 6):
        fresh = make_case(16, 128, 8, seed) | {"similarity": case["similarity"]}
        for name, buffer in static.items():
            buffer.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        check_equal(captured, run(fresh, "cpu"))
