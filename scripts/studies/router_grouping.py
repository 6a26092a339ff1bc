"""Measure what grouping requests by policy does to active experts: two workers behind a router.

    python scripts/studies/router_grouping.py --router sglang-router --out build/grouping.json

The same requests are sent to two servers of the demo model in several arrangements: `spread` lets
the router take turns, so that policies mix on both; the others send all requests of a policy to
one worker, by the router's routing key. Arrangements take turns within a repetition. Counts come
from the workers' statistics. Times are left out: both workers share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from sglang_moe_routing import demo
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.serving.load import read_counts
from sglang_moe_routing.serving.machine import describe_machine
from sglang_moe_routing.serving.server import free_port, running_server, stop_server

HEADER = "X-Request-Id-MoE-Routing-Policy"
"""A name that the router forwards; it drops the default one."""

ROUTING_KEY = "X-SMG-Routing-Key"
NUM_WORKERS = 2
READY_TIMEOUT_S = 60.0

Groups = Sequence[Sequence[str]]
"""Policies of each worker."""

MIXES: Mapping[str, tuple[Mapping[str, int], Mapping[str, Groups | None]]] = {
    "half": (
        {"vanilla": 16, "oea-k3": 16},
        {"spread": None, "by policy": (["vanilla"], ["oea-k3"])},
    ),
    "uneven": (
        {"vanilla": 24, "oea-k3": 8},
        {"spread": None, "by policy": (["vanilla"], ["oea-k3"])},
    ),
    "four": (
        {"vanilla": 8, "topk-k3": 8, "oea-k3": 8, "sere-s3": 8},
        {
            "spread": None,
            "vanilla + topk": (["vanilla", "topk-k3"], ["oea-k3", "sere-s3"]),
            "vanilla + oea": (["vanilla", "oea-k3"], ["topk-k3", "sere-s3"]),
            "vanilla + sere": (["vanilla", "sere-s3"], ["topk-k3", "oea-k3"]),
        },
    ),
}
"""Requests by policy, and the arrangements that are compared; None is no grouping."""


@dataclass(frozen=True)
class Counts:
    """What one worker counted during a wave, summed over MoE layers."""

    layers: int
    calls: int
    rows: int
    active: int
    base: int

    def as_json(self) -> dict[str, float]:
        """Means per layer and decode step, and the totals that they are made of."""
        calls = self.calls or 1
        return {
            "steps": self.calls / self.layers,
            "rows_per_step": self.rows / calls,
            "active_experts": self.active / calls,
            "active_experts_base": self.base / calls,
            "loads_per_layer": self.active / self.layers,
        }


@contextlib.contextmanager
def running_router(
    program: Sequence[str], workers: Sequence[str], flags: Sequence[str], log: Path
) -> Iterator[str]:
    """A router in front of running `workers`; yields its URL.

    Raises:
        EngineError: it ended or did not become ready.
    """
    port, metrics_port = free_port(), free_port()
    address = ["--host", "127.0.0.1", "--port", str(port)]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    arguments = [*program, "launch", *address, *metrics, "--worker-urls", *workers, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, len(workers), process, log)
        yield url
    finally:
        stop_server(process)


def _wait_until_ready(
    url: str, num_workers: int, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{url}/readiness", timeout=5)
            if answer.is_success and answer.json()["healthy_workers"] == num_workers:
                return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise EngineError(f"the router did not become ready (status {process.poll()}):\n{tail}")


class Fleet:
    """Two workers and the two routers in front of them: one takes turns, one groups by key."""

    def __init__(self, workers: Sequence[str], turns: str, grouping: str) -> None:
        self._workers = workers
        self._turns = turns
        self._grouping = grouping

    async def run(
        self, jobs: Sequence[tuple[str, str]], keys: Mapping[str, str] | None, max_tokens: int
    ) -> list[Counts]:
        """Send all `jobs` (policy, prompt) at once; what each worker counted.

        Args:
            keys: routing key of each policy; None takes turns.
        """
        before = await self._read()
        async with self._client(self._turns if keys is None else self._grouping) as http:
            await asyncio.gather(
                *(
                    self._send(http, policy, prompt, max_tokens, keys and keys[policy])
                    for policy, prompt in jobs
                )
            )
        after = await self._read()
        return [_difference(*pair) for pair in zip(before, after, strict=True)]

    async def settle(self, name: str, worker: int) -> str:
        """A key that the grouping router has come to send to worker number `worker`."""
        for number in itertools.count():
            key = f"{name}-{number}"
            before = await self._read()
            async with self._client(self._grouping) as http:
                await self._send(http, "vanilla", "It was", 3, key)
            after = await self._read()
            if after[worker]["rows"] > before[worker]["rows"]:
                return key
        raise AssertionError("unreachable")

    async def _send(
        self, http: httpx.AsyncClient, policy: str, prompt: str, max_tokens: int, key: str | None
    ) -> None:
        response = await http.post(
            "/v1/completions",
            json={
                "model": "demo",
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
            headers={HEADER: policy} | ({ROUTING_KEY: key} if key else {}),
        )
        response.raise_for_status()
        if response.headers.get(HEADER) != policy:
            raise EngineError(f"{policy!r} was answered under {response.headers.get(HEADER)!r}")

    async def _read(self) -> list[Mapping[str, int]]:
        found = []
        for url in self._workers:
            async with self._client(url) as http:
                counts = await read_counts(http)
            if counts is None:
                raise EngineError(f"the worker at {url} keeps no statistics")
            found.append(counts)
        return found

    def _client(self, url: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, timeout=300)


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> Counts:
    return Counts(
        layers=after["layers"],
        calls=after["calls"] - before["calls"],
        rows=after["rows"] - before["rows"],
        active=after["active_experts"] - before["active_experts"],
        base=after["active_experts_base"] - before["active_experts_base"],
    )


def make_jobs(mix: Mapping[str, int], seed: int) -> list[tuple[str, str]]:
    """Policies and prompts of one wave, shuffled: a router that takes turns must not sort them.

    No two prompts are alike, which would share their experts: they are pairs of the demo's.
    """
    rng = random.Random(seed)
    pairs = [" ".join(pair) for pair in itertools.permutations(demo.read_prompts(), 2)]
    prompts = iter(rng.sample(pairs, sum(mix.values())))
    jobs = [(policy, next(prompts)) for policy, count in mix.items() for _ in range(count)]
    rng.shuffle(jobs)
    return jobs


async def measure(
    fleet: Fleet, repetitions: int, max_tokens: int, console: Console
) -> dict[str, dict[str, list[list[Counts]]]]:
    """Counts of every worker by mix, arrangement and repetition."""
    keys: dict[tuple[str, str], dict[str, str] | None] = {}
    for name, (_, arrangements) in MIXES.items():
        for arrangement, groups in arrangements.items():
            keys[name, arrangement] = await _keys(fleet, f"{name}/{arrangement}", groups)
    waves: dict[str, dict[str, list[list[Counts]]]] = {name: {} for name in MIXES}
    for repetition in range(repetitions):
        for (name, arrangement), key_of in keys.items():
            jobs = make_jobs(MIXES[name][0], seed=repetition)
            counts = await fleet.run(jobs, key_of, max_tokens)
            waves[name].setdefault(arrangement, []).append(counts)
        console.print(f"repetition {repetition + 1} of {repetitions}")
    return waves


async def _keys(fleet: Fleet, name: str, groups: Groups | None) -> dict[str, str] | None:
    if groups is None:
        return None
    names = [await fleet.settle(f"{name}/{worker}", worker) for worker in range(len(groups))]
    return {policy: names[i] for i, policies in enumerate(groups) for policy in policies}


def summarise(waves: Sequence[Sequence[Counts]]) -> dict[str, Any]:
    """Median and half the range over repetitions, per worker and for both."""
    workers = [[wave[i].as_json() for wave in waves] for i in range(NUM_WORKERS)]
    both = [
        {
            "active_experts": sum(c.active for c in wave) / sum(c.calls for c in wave),
            "active_experts_base": sum(c.base for c in wave) / sum(c.calls for c in wave),
            "loads_per_layer": sum(c.active / c.layers for c in wave),
        }
        for wave in waves
    ]
    return {"workers": [_spread(found) for found in workers], "both": _spread(both)}


def _spread(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    summary = {}
    for name in found[0]:
        values = [one[name] for one in found]
        summary[name] = round(statistics.median(values), 3)
        summary[f"{name}_spread"] = round((max(values) - min(values)) / 2, 3)
    return summary


def show(results: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print one table."""
    table = Table("requests", "arrangement", "rows", "T", "T base", "T, both", "loads, both")
    for name, arrangements in results.items():
        for arrangement, found in arrangements.items():
            columns = ("rows_per_step", "active_experts", "active_experts_base")
            cells = [" | ".join(f"{w[c]:.1f}" for w in found["workers"]) for c in columns]
            both = found["both"]
            total = f"{both['loads_per_layer']:.0f}"
            table.add_row(name, arrangement, *cells, f"{both['active_experts']:.1f}", total)
    console.print(table)


@contextlib.contextmanager
def running_fleet(router: Sequence[str], folder: Path) -> Iterator[Fleet]:
    """Two workers under the demo's policies, and both routers."""
    config = folder / "routing.yaml"
    similarity = demo.CONFIG.with_name("similarity.safetensors")
    text = demo.CONFIG.read_text(encoding="utf-8").replace(
        "demo: similarity.safetensors", f"demo: {similarity}"
    )
    config.write_text(f"{text}\nheader: {HEADER}\n", encoding="utf-8")
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                running_server(
                    demo.MODEL,
                    config=config,
                    flags=["--served-model-name", "demo", "--disable-radix-cache"],
                    environment={"OMP_NUM_THREADS": "1"},
                    log=folder / f"worker-{number}.log",
                )
            ).url
            for number in range(NUM_WORKERS)
        ]
        turns, grouping = (
            stack.enter_context(
                running_router(router, workers, ["--policy", policy], folder / f"{policy}.log")
            )
            for policy in ("round_robin", "manual")
        )
        yield Fleet(workers, turns, grouping)


def main() -> None:
    console = Console()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--router", default="sglang-router", help="Program of sglang-router.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write.")
    args = parser.parse_args()
    program = shutil.which(args.router)
    if program is None:
        sys.exit(f"{args.router} is not installed; run: pip install sglang-router")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_fleet([program], Path(folder)) as fleet,
    ):
        waves = asyncio.run(measure(fleet, args.repetitions, args.max_tokens, console))
    results = {
        name: {arrangement: summarise(found) for arrangement, found in arrangements.items()}
        for name, arrangements in waves.items()
    }
    show(results, console)
    written = {
        "model": "demo",
        "repetitions": args.repetitions,
        "max_tokens": args.max_tokens,
        "machine": describe_machine(),
        "requests": {name: dict(mix) for name, (mix, _) in MIXES.items()},
        "results": results,
    }
    args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
