"""Time of the re-routing beside the engine's top-k and the torch reference."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels import choose, refine_out, workspace
from ..policies import OEA, SERE, Policy, Router, TopK, Vanilla, build_table, reroute

MIN_ROUND_S = 2e-3
"""A round repeats a call until it takes this long, so that the clock does not matter."""

CALLS_PER_GRAPH = 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, microseconds per call.

    `refine` comes after the engine's top-k and adds to it.
    `spread_us` is the distance between the quartiles of the operator's rounds.
    """

    op: str
    device: str
    rows: int
    experts: int
    top_k: int
    median_us: float
    spread_us: float
    engine_topk_us: float
    reference_us: float


def run(
    rows: Sequence[int],
    experts: Sequence[int],
    *,
    top_k: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    rounds: int = 15,
) -> Iterator[Timing]:
    """Measure every shape; rows follow vanilla, topk, oea and sere in turn.

    On CUDA every measured call is a node of a captured graph, as in serving. Rounds of all
    contestants alternate, so that a disturbance meets them alike.

    Raises:
        KernelError: there are no compiled kernels for `device`.
    """
    implementation = choose("cuda" if device.startswith("cuda") else "cpu")
    if not implementation.is_native:
        raise KernelError(f"nothing to measure: {implementation.reason}")
    for num_experts in experts:
        for num_rows in rows:
            yield from _measure(num_rows, num_experts, top_k, dtype, device, rounds)


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """The JSON form of a measurement."""
    return {"cases": [asdict(timing) for timing in timings]}


def _measure(
    num_rows: int, num_experts: int, top_k: int, dtype: torch.dtype, device: str, rounds: int
) -> Iterator[Timing]:
    calls = _calls(num_rows, num_experts, top_k, dtype, device)
    timers = {name: _timer(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    medians = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    for op in ("refine",):
        quartiles = statistics.quantiles(samples[op], n=4)
        yield Timing(
            op=op,
            device=device,
            rows=num_rows,
            experts=num_experts,
            top_k=top_k,
            median_us=medians[op],
            spread_us=round(quartiles[2] - quartiles[0], 2),
            engine_topk_us=medians["engine"],
            reference_us=medians["reference"],
        )


def _policies(top_k: int) -> list[Policy]:
    kept = max(1, top_k * 3 // 8)
    return [
        Vanilla(),
        TopK.model_validate({"k0": kept}),
        OEA.model_validate({"k0": kept}),
        SERE.model_validate({"num_primary": kept, "threshold": 0.0}),
    ]


def _calls(
    num_rows: int, num_experts: int, top_k: int, dtype: torch.dtype, device: str
) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, num_experts, generator=generator).to(device, dtype)
    router = Router()
    policies = _policies(top_k)
    table = build_table(
        policies,
        layer=0,
        top_k=top_k,
        num_experts=num_experts,
        similarity={"random": torch.rand(num_experts, num_experts, generator=generator)},
        artifacts=[None, None, None, "random"],
        device=device,
    )
    policy_ids = (torch.arange(num_rows) % len(policies)).int().to(device)
    engine = _engine_topk(logits, top_k)
    weights, ids = engine()
    weights, ids = weights.float(), ids.int()
    out: dict[str, Any] = {
        "out_ids": torch.empty_like(ids),
        "out_weights": torch.empty_like(weights),
        "out_union": torch.empty(num_experts, dtype=torch.bool, device=device),
        "workspace": workspace(device) if device != "cpu" else None,
    }

    def reference() -> object:
        scores, gates = router.score(logits, ids)
        return reroute(scores, gates, ids, weights, policy_ids, table, renormalize=True)

    return {
        "engine": engine,
        "refine": lambda: refine_out(logits, ids, weights, policy_ids, table, router, **out),
        "reference": reference,
    }


def _engine_topk(logits: Tensor, top_k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    if importlib.util.find_spec("sglang") is None:
        return lambda: _plain_topk(logits, top_k)
    from ..integration.engine_topk import engine_topk

    return engine_topk(logits, top_k)


def _plain_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What stands in for the engine where SGLang is not installed."""
    weights, ids = torch.topk(logits.float().softmax(dim=-1), top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids.int()


def _timer(call: Call, device: str) -> Callable[[], float]:
    """A function that runs one round and returns microseconds per call."""
    return _cuda_timer(call) if device.startswith("cuda") else _cpu_timer(call)


def _cpu_timer(call: Call) -> Callable[[], float]:
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(MIN_ROUND_S / max(time.perf_counter() - start, 1e-7)))

    def run_round() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats * 1e6

    return run_round


def _cuda_timer(call: Call) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    graph.replay()

    def run_round() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms * 1e3 / (10 * CALLS_PER_GRAPH)

    return run_round
