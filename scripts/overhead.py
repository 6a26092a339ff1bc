"""What the extension costs per output token where it changes nothing, on the bundled demo model.

Servers run at once and are measured in turn, in pairs of alternating order:

- stock:         SGLang on the portable CPU platform, without routing policies
- stock-metrics: the same with --enable-metrics: what SGLang's own metrics cost
- attached:      with policies, all requests vanilla
- counted:       with --enable-metrics, and policies whose experts and rows are counted and exported
- uncounted:     the same with `statistics: false`

A pair gives one ratio of times per output token, and one of the CPU time of the scheduler per
token, which other work on the machine disturbs less. Reported are medians of the ratios with
bootstrap intervals.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from sglang_moe_routing import demo
from sglang_moe_routing.bench.load import Job, LoadClient
from sglang_moe_routing.bench.machine import describe_machine
from sglang_moe_routing.bench.server import Server, running_server

COMPARISONS = {
    "off": ("policies attached, vanilla requests / stock", "vanilla", "attached", "stock"),
    "metrics": ("routing metrics on / off, oea-k3 requests", "oea-k3", "counted", "uncounted"),
    "sglang": ("SGLang's own metrics on / off", "vanilla", "stock-metrics", "stock"),
}
"""What is compared: title, policy of the requests, and the two servers."""

METRICS = ("--enable-metrics",)
FLAGS = {
    "stock": (),
    "stock-metrics": METRICS,
    "attached": (),
    "counted": METRICS,
    "uncounted": METRICS,
}
WARM_UP = 3


class Subject:
    """One running server."""

    def __init__(self, server: Server) -> None:
        self._client = LoadClient(server.url)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (self._scheduler,) = [p for p in children if "scheduler" in " ".join(p.cmdline())]

    def measure(self, policy: str, concurrency: int, num_tokens: int) -> dict[str, Any]:
        """Milliseconds per output token, CPU nanoseconds per token, and the texts."""
        prompts = demo.read_prompts()
        jobs = [Job(prompts[i % len(prompts)], policy) for i in range(concurrency)]
        before = self._cpu_ns()
        load = asyncio.run(self._client.run(jobs, max_tokens=num_tokens))
        used = self._cpu_ns() - before
        return {
            "tpot": load.tpot_ms,
            "cpu": used / load.num_tokens,
            "texts": [answer.text for answer in load.answers],
        }

    def _cpu_ns(self) -> int:
        threads = Path(f"/proc/{self._scheduler.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


def compare(
    left: Callable[[], dict[str, Any]], right: Callable[[], dict[str, Any]], num_pairs: int
) -> dict[str, Any]:
    """Ratios of `left` to `right`."""
    for _ in range(WARM_UP):
        left(), right()
    ratios: dict[str, list[float]] = {"tpot": [], "cpu": []}
    same_text = True
    tpot_ms = []
    for pair in range(num_pairs):
        if pair % 2:
            a, b = left(), right()
        else:
            b, a = right(), left()
        for key, values in ratios.items():
            values.append(a[key] / b[key])
        same_text &= a["texts"] == b["texts"]
        tpot_ms.append(b["tpot"])
    return {
        "pairs": num_pairs,
        "tpot_ms_of_the_second": round(float(np.median(tpot_ms)), 3),
        "same_text": same_text,
        **{key: _interval(values) for key, values in ratios.items()},
    }


def _interval(ratios: list[float]) -> dict[str, float]:
    """Median of the ratios with its 95 % bootstrap interval."""
    values = np.array(ratios)
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {
        "ratio": round(float(np.median(values)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def main(
    comparisons: Annotated[list[str] | None, typer.Argument(help=", ".join(COMPARISONS))] = None,
    num_pairs: Annotated[int, typer.Option("--pairs")] = 60,
    concurrency: int = 8,
    num_tokens: int = 256,
    output: Path = Path("docs/bench/overhead.json"),
) -> None:
    """Start the servers of some comparisons (by default all), compare them, write JSON."""
    wanted = {name: COMPARISONS[name] for name in comparisons or COMPARISONS}
    found = json.loads(output.read_text()) if output.exists() else {"comparisons": {}}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = {server for _, _, *servers in wanted.values() for server in servers}
        subjects = {name: Subject(stack.enter_context(running(name, folder))) for name in names}
        for title, policy, left, right in wanted.values():
            result = compare(
                lambda: subjects[left].measure(policy, concurrency, num_tokens),  # noqa: B023
                lambda: subjects[right].measure(policy, concurrency, num_tokens),  # noqa: B023
                num_pairs,
            )
            title = f"{title}, {concurrency} requests of {num_tokens} tokens at a time"
            print(title, json.dumps(result), flush=True)
            found["comparisons"][title] = result
    found["machine"] = describe_machine()
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def running(name: str, folder: Path) -> contextlib.AbstractContextManager[Server]:
    """One of the servers."""
    config = folder / f"{name}.yaml"
    similarity = demo.CONFIG.with_name("similarity.safetensors")
    text = demo.CONFIG.read_text().replace(similarity.name, str(similarity))
    config.write_text(text + ("statistics: false\n" if name == "uncounted" else ""))
    return running_server(
        demo.MODEL,
        config=None if name.startswith("stock") else config,
        flags=["--random-seed", "0", "--max-total-tokens", "16384", *FLAGS[name]],
        environment={"OMP_NUM_THREADS": "1"},
        log=folder / f"{name}.log",
        cpu=True,
    )


if __name__ == "__main__":
    typer.run(main)
