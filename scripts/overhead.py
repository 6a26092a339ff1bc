"""What the extension costs per output token where it changes nothing, on the bundled demo model.

Three servers run at once and are measured in turn, in pairs of alternating order:

- stock:    SGLang on the portable CPU platform, without routing policies
- attached: with policies, all requests vanilla; also under oea, to compare with
- metrics:  the same with --enable-metrics

A pair gives one ratio of times per output token, and one of the CPU seconds of the scheduler per
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
    "policies attached, vanilla requests / stock": (("attached", "vanilla"), ("stock", "vanilla")),
    "metrics on / off, oea-k3 requests": (("metrics", "oea-k3"), ("attached", "oea-k3")),
}
FLAGS = {"stock": (), "attached": (), "metrics": ("--enable-metrics",)}
WARM_UP = 3


class Subject:
    """One running server."""

    def __init__(self, server: Server) -> None:
        self._client = LoadClient(server.url)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (self._scheduler,) = [p for p in children if "scheduler" in " ".join(p.cmdline())]

    def measure(self, policy: str, concurrency: int, num_tokens: int) -> dict[str, Any]:
        """Seconds and CPU seconds per output token, and the texts."""
        prompts = demo.read_prompts()
        jobs = [Job(prompts[i % len(prompts)], policy) for i in range(concurrency)]
        before = self._cpu_seconds()
        load = asyncio.run(self._client.run(jobs, max_tokens=num_tokens))
        used = self._cpu_seconds() - before
        return {
            "tpot": load.tpot_ms,
            "cpu": used / load.num_tokens,
            "texts": [answer.text for answer in load.answers],
        }

    def _cpu_seconds(self) -> float:
        times = self._scheduler.cpu_times()
        return float(times.user + times.system)


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
    num_pairs: Annotated[int, typer.Option("--pairs")] = 60,
    concurrency: int = 8,
    num_tokens: int = 48,
    output: Path = Path("docs/bench/overhead.json"),
) -> None:
    """Start the servers, compare them, write JSON."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = {
            name: Subject(
                stack.enter_context(
                    running_server(
                        demo.MODEL,
                        config=None if name == "stock" else demo.CONFIG,
                        flags=["--random-seed", "0", "--max-total-tokens", "16384", *flags],
                        environment={"OMP_NUM_THREADS": "1"},
                        log=folder / f"{name}.log",
                        cpu=True,
                    )
                )
            )
            for name, flags in FLAGS.items()
        }
        found = {}
        for title, sides in COMPARISONS.items():
            left, right = (
                lambda side=side: subjects[side[0]].measure(side[1], concurrency, num_tokens)
                for side in sides
            )
            found[title] = compare(left, right, num_pairs)
            print(title, json.dumps(found[title]), flush=True)
    result = {
        "machine": describe_machine(),
        "concurrency": concurrency,
        "tokens": num_tokens,
        "comparisons": found,
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
