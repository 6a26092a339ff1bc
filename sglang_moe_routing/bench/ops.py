"""Time of the re-routing beside the engine's top-k and the torch reference."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels import BoundLayer, choose, workspace
from ..policies import OEA, SERE, Budget, Policy, Router, TopK, Vanilla, build_table, reroute

MIN_ROUND_S = 2e-3
"""A round repeats a call until it takes this long, so that the clock does not matter."""

MAX_CALLS = 1000
"""At most, of one round."""

CALLS_PER_GRAPH = 100

Call = Callable[[], Any]


@dataclass(frozen=True)
class _Contestant:
    """Calls that cost the same, and what makes them ready for another round."""

    calls: Sequence[Call]
    reset: Call = lambda: None


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, microseconds per call.

    The re-routing comes after the engine's top-k and adds to it. `spread_us` is the distance
    between the quartiles of its rounds. `idle_us` is the time of rows under a budget that every
    choice fits, `vanilla_us` that of vanilla rows: between them lies what a policy costs that
    saves nothing.
    """

    device: str
    rows: int
    experts: int
    top_k: int
    median_us: float
    spread_us: float
    idle_us: float
    vanilla_us: float
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
    """Measure every shape; rows follow vanilla, topk, oea, sere and budget in turn.

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
            yield _measure(num_rows, num_experts, top_k, dtype, device, rounds)


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """The JSON form of a measurement."""
    return {"cases": [asdict(timing) for timing in timings]}


def _measure(
    num_rows: int, num_experts: int, top_k: int, dtype: torch.dtype, device: str, rounds: int
) -> Timing:
    contestants = _contestants(num_rows, num_experts, top_k, dtype, device)
    timers = {name: _timer(contestant, device) for name, contestant in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    medians = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    quartiles = statistics.quantiles(samples["reroute"], n=4)
    return Timing(
        device=device,
        rows=num_rows,
        experts=num_experts,
        top_k=top_k,
        median_us=medians["reroute"],
        spread_us=round(quartiles[2] - quartiles[0], 2),
        idle_us=medians["idle"],
        vanilla_us=medians["vanilla"],
        engine_topk_us=medians["engine"],
        reference_us=medians["reference"],
    )


def _policies(top_k: int, num_experts: int) -> list[Policy]:
    kept = max(1, top_k * 3 // 8)
    return [
        Vanilla(),
        TopK.model_validate({"k0": kept}),
        OEA.model_validate({"k0": kept}),
        SERE.model_validate({"num_primary": kept, "threshold": 0.0}),
        Budget.model_validate({"max_active": max(1, num_experts // 4)}),
    ]


def _contestants(
    num_rows: int, num_experts: int, top_k: int, dtype: torch.dtype, device: str
) -> dict[str, _Contestant]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, num_experts, generator=generator).to(device, dtype)
    router = Router()
    policies = _policies(top_k, num_experts)
    idle = Budget.model_validate({"max_active": num_experts})
    table = build_table(
        [*policies, idle],
        layer=0,
        top_k=top_k,
        num_experts=num_experts,
        similarity={"random": torch.rand(num_experts, num_experts, generator=generator)},
        artifacts=[None, None, None, "random", None, None],
        device=device,
    )
    policy_ids = (torch.arange(num_rows) % len(policies)).int().to(device)
    engine = _engine_topk(logits, top_k)
    weights, ids = engine()
    weights, ids = weights.float(), ids.int()
    layer = BoundLayer(
        table,
        router,
        torch.empty(num_experts, dtype=torch.bool, device=device),
        top_k=top_k,
        workspace=workspace(device),
    )
    # in place: every call of a round has a choice of its own
    all_ids, all_weights = (x.expand(MAX_CALLS, -1, -1).clone() for x in (ids, weights))

    def reset() -> None:
        all_ids.copy_(ids)
        all_weights.copy_(weights)

    def reference() -> object:
        scores, gates = router.score(logits, ids)
        return reroute(scores, gates, ids, weights, policy_ids, table, renormalize=True)

    choices = zip(all_ids, all_weights, strict=True)
    calls = [partial(layer.reroute, logits, *choice, policy_ids) for choice in choices]

    def all_under(policy: int) -> _Contestant:  # rows that stay as they are
        plan = torch.full_like(policy_ids, policy)
        return _Contestant([partial(layer.reroute, logits, ids, weights, plan)] * MAX_CALLS)

    return {
        "engine": _Contestant([engine] * MAX_CALLS),
        "reroute": _Contestant(calls, reset),
        "idle": all_under(len(policies)),
        "vanilla": all_under(0),
        "reference": _Contestant([reference] * MAX_CALLS),
    }


def _engine_topk(logits: Tensor, top_k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    if importlib.util.find_spec("sglang") is None:
        return lambda: _plain_topk(logits, top_k)
    from ..engine.topk import engine_topk

    return engine_topk(logits, top_k)


def _plain_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What stands in for the engine where SGLang is not installed."""
    weights, ids = torch.topk(logits.float().softmax(dim=-1), top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids.int()


def _timer(contestant: _Contestant, device: str) -> Callable[[], float]:
    """A function that runs one round and returns microseconds per call."""
    return _cuda_timer(contestant) if device.startswith("cuda") else _cpu_timer(contestant)


def _cpu_timer(contestant: _Contestant) -> Callable[[], float]:
    first, *others = contestant.calls
    for call in others[:3]:
        call()
    start = time.perf_counter()
    first()
    repeats = max(1, int(MIN_ROUND_S / max(time.perf_counter() - start, 1e-7)))
    calls = contestant.calls[:repeats]

    def run_round() -> float:
        contestant.reset()
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6

    return run_round


def _cuda_timer(contestant: _Contestant) -> Callable[[], float]:
    calls = contestant.calls[:CALLS_PER_GRAPH]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()

    def run_round() -> float:
        contestant.reset()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms * 1e3 / len(calls)

    return run_round
