"""What an idle server says of itself, and what its processes hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.serving.server import Server

from .asks import Served

IDLE_TIMEOUT_S = 120.0
METRICS_TIMEOUT_S = 15.0
METRICS = "sglang_moe_routing_"
SAMPLE_EVERY_S = 1.0
MAX_SAMPLES = 240
RETRACTED = re.compile(r"KV cache pool is full\. Retract requests\. #retracted_reqs: (\d+)")


@dataclass(frozen=True)
class Reading:
    """What an idle server says of itself.

    Attributes:
        layers: counts of every MoE layer.
        retracted: retractions since the start, by the log.
        retracted_metric: the same, by SGLang's metrics.
        rows: decode rows by policy, by this package's metrics.
        rejected: requests refused, by this package's metrics.
    """

    used_tokens: int
    layers: Sequence[Mapping[str, int]]
    retracted: int
    retracted_metric: int
    rss_mib: Mapping[str, float]
    rows: Mapping[str, int]
    rejected: int


class Watch:
    """Resident memory of every process of the server's group, over time."""

    def __init__(self, server: Server) -> None:
        self._group = server.process.pid
        self._start = time.monotonic()
        self._labels: dict[int, str] = {}
        self.samples: list[tuple[float, dict[str, float]]] = []

    def read(self) -> dict[str, float]:
        """MiB by process, now."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self._group:
                    memory = process.memory_info().rss / 2**20
                    found[self._label(process)] = round(memory, 2)
        return found

    def _label(self, process: psutil.Process) -> str:
        if process.pid not in self._labels:
            words = " ".join(process.cmdline())
            name = "http" if process.pid == self._group else process.name()
            title = re.search(r"sglang::\w+|resource_tracker", words)
            self._labels[process.pid] = f"{title.group() if title else name} {process.pid}"
        return self._labels[process.pid]

    def sample(self) -> None:
        self.samples.append((round(time.monotonic() - self._start, 1), self.read()))

    async def run(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_EVERY_S)

    def slopes(self, since_s: float) -> dict[str, float]:
        """MiB per minute of every process, by least squares."""
        kept = [(at / 60, rss) for at, rss in self.samples if at >= since_s]
        found = {}
        for label in kept[-1][1] if kept else ():
            points = [(at, rss[label]) for at, rss in kept if label in rss]
            if len(points) > 1:
                found[label] = round(
                    statistics.linear_regression(*zip(*points, strict=True)).slope, 3
                )
        return found

    def thinned(self) -> dict[str, Any]:
        """Evenly spaced samples for the record."""
        step = max(1, -(-len(self.samples) // MAX_SAMPLES))
        kept = self.samples[::step]
        labels = dict.fromkeys(label for _, rss in kept for label in rss)
        series = {label: [rss.get(label) for _, rss in kept] for label in labels}
        return {"seconds": [at for at, _ in kept], "mib": series}


async def read_served(http: httpx.AsyncClient, wanted: Sequence[str]) -> Served:
    """The policies to ask for: those `wanted`, or all that clients may choose."""
    listing = (await http.get("/v1/moe_routing/policies")).raise_for_status().json()
    kinds = {policy["id"]: policy["definition"]["kind"] for policy in listing["data"]}
    choosable = [policy["id"] for policy in listing["data"] if policy["choosable"]]
    unknown = [name for name in wanted if name not in choosable]
    if unknown:
        raise EngineError(f"policy {unknown[0]!r} is not served; available: {choosable}")
    return Served(listing["header"], listing["default"], wanted or choosable, kinds)


async def read_idle(http: httpx.AsyncClient, server: Server, watch: Watch) -> Reading:
    """Wait until nothing runs or waits, and read what the server says then.

    Raises:
        EngineError: the server has ended, or does not fall idle.
    """
    load = await _wait_until_idle(http, server)
    answer = (await http.get("/v1/moe_routing/statistics")).raise_for_status().json()
    layers = [layer for worker in answer["data"] for layer in worker["layers"] or ()]
    metrics = await _read_metrics(http, layers[0]["rows"] if layers else 0)
    return Reading(
        used_tokens=load["num_used_tokens"],
        layers=layers,
        retracted=sum(map(int, RETRACTED.findall(server.log.read_text(errors="replace")))),
        retracted_metric=sum(count_metric(metrics, "sglang:num_retracted_requests_total").values()),
        rss_mib=watch.read(),
        rows=count_metric(metrics, f"{METRICS}rows_total", "policy"),
        rejected=sum(count_metric(metrics, f"{METRICS}rejected_requests_total").values()),
    )


async def _read_metrics(http: httpx.AsyncClient, num_rows: int) -> str:
    """Metrics that have come to `num_rows`, or those of when waiting for that was given up."""
    deadline = time.monotonic() + METRICS_TIMEOUT_S
    while True:
        text = (await http.get("/metrics")).raise_for_status().text
        rows = count_metric(text, f"{METRICS}rows_total")
        if sum(rows.values()) == num_rows or time.monotonic() > deadline:
            return text
        await asyncio.sleep(0.5)


async def _wait_until_idle(http: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    deadline, quiet = time.monotonic() + IDLE_TIMEOUT_S, 0
    while time.monotonic() < deadline:
        server.check()
        (load,) = (await http.get("/v1/loads")).raise_for_status().json()["loads"]
        is_idle = not load["num_running_reqs"] and not load["num_waiting_reqs"]
        quiet = quiet + 1 if is_idle else 0
        if quiet == 4:  # an abort may still be on its way
            return load
        await asyncio.sleep(0.5)
    raise EngineError(f"the server is not idle after {IDLE_TIMEOUT_S:.0f} s: {load}")


def count_metric(text: str, name: str, label: str = "") -> dict[str, int]:
    """Values of a counter by `label`, summed over all others; empty before its first increment."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels.get(label, "")] += int(sample.value)
    return dict(found)


def differences(before: Reading, after: Reading) -> list[dict[str, int]]:
    """Counts of every layer between two readings."""
    return [
        {name: new[name] - old[name] if name != "layer" else new[name] for name in new}
        for old, new in zip(before.layers, after.layers, strict=True)
    ]
