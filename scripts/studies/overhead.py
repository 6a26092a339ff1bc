"""What the extension costs per output token where it changes nothing, on the bundled demo model.

Servers run at once and are measured in turn, in pairs of alternating order:

- stock:         SGLang on the portable CPU platform, without routing policies
- stock-too:     another one
- stock-metrics: the same with --enable-metrics: what SGLang's own metrics cost
- attached:      with policies, all requests vanilla
- attached-bare: the same with `statistics: false`
- counted:       with --enable-metrics, and policies whose experts and rows are counted and exported
- uncounted:     `counted` with `statistics: false`

A pair gives one ratio of times per output token, and one of the CPU time of the scheduler per
token, which other work on the machine disturbs less. Two servers that do the same also differ by a
percent or two, from start to start: so they are started anew in every round, and `same` compares
two stock servers. Reported are medians of the ratios, with bootstrap intervals over rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from sglang_moe_routing import demo
from sglang_moe_routing.serving.load import Job, LoadClient
from sglang_moe_routing.serving.machine import describe_machine
from sglang_moe_routing.serving.server import Server, running_server

COMPARISONS = {
    "same": ("stock / stock", "vanilla", "stock-too", "stock"),
    "off": ("policies attached, vanilla requests / stock", "vanilla", "attached", "stock"),
    "bare": ("the same without statistics", "vanilla", "attached-bare", "stock"),
    "metrics": ("routing metrics on / off, oea-k3 requests", "oea-k3", "counted", "uncounted"),
    "sglang": ("SGLang's own metrics on / off", "vanilla", "stock-metrics", "stock"),
}
"""What is compared: title, policy of the requests, and the two servers."""

METRICS = ("--enable-metrics",)
FLAGS = {
    "stock": (),
    "stock-too": (),
    "stock-metrics": METRICS,
    "attached": (),
    "attached-bare": (),
    "counted": METRICS,
    "uncounted": METRICS,
}
UNCOUNTED = ("attached-bare", "uncounted")
WARM_UP = 2


class Subject:
    """One running server."""

    def __init__(self, server: Server) -> None:
        self._client = LoadClient(server.url)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (self._scheduler,) = [p for p in children if "scheduler" in " ".join(p.cmdline())]

    def measure(self, policy: str, concurrency: int, num_tokens: int) -> dict[str, float]:
        """Milliseconds and CPU nanoseconds per output token."""
        prompts = demo.read_prompts()
        jobs = [Job(prompts[i % len(prompts)], policy) for i in range(concurrency)]
        before = self._cpu_ns()
        load = asyncio.run(self._client.run(jobs, max_tokens=num_tokens))
        used = self._cpu_ns() - before
        return {"tpot": load.tpot_ms, "cpu": used / load.num_tokens}

    def _cpu_ns(self) -> int:
        threads = Path(f"/proc/{self._scheduler.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


Ratios = dict[str, list[float]]


def measure_pairs(
    left: Callable[[], dict[str, float]], right: Callable[[], dict[str, float]], num_pairs: int
) -> Ratios:
    """Ratios of `left` to `right`, and the time per token of `right`."""
    for _ in range(WARM_UP):
        left(), right()
    found: Ratios = {"tpot": [], "cpu": [], "tpot_ms": []}
    for pair in range(num_pairs):
        if pair % 2:
            a, b = left(), right()
        else:
            b, a = right(), left()
        found["tpot"].append(a["tpot"] / b["tpot"])
        found["cpu"].append(a["cpu"] / b["cpu"])
        found["tpot_ms"].append(b["tpot"])
    return found


def summarize(rounds: list[Ratios]) -> dict[str, Any]:
    """Medians over all pairs, with intervals."""
    return {
        "rounds": len(rounds),
        "pairs": sum(len(one["tpot"]) for one in rounds),
        "tpot_ms_of_the_second": round(
            float(np.median(np.concatenate([one["tpot_ms"] for one in rounds]))), 2
        ),
        **{key: _interval([one[key] for one in rounds]) for key in ("tpot", "cpu")},
    }


def _interval(rounds: list[list[float]]) -> dict[str, float]:
    """Median of all ratios; 95 % bootstrap interval that draws rounds, for pairs of one round
    share their two processes."""
    values = np.array(rounds)
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(
        np.median(values[drawn].reshape(len(drawn), -1), axis=1), (0.025, 0.975)
    )
    return {
        "ratio": round(float(np.median(values)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "of_rounds": [round(float(np.median(one)), 4) for one in values],
    }


def main(
    comparisons: Annotated[
        list[str] | None, typer.Argument(help=f"Any of {', '.join(COMPARISONS)}.")
    ] = None,
    num_rounds: Annotated[int, typer.Option("--rounds")] = 6,
    num_pairs: Annotated[int, typer.Option("--pairs", help="Pairs of every round.")] = 10,
    concurrency: int = 8,
    num_tokens: int = 256,
    output: Path = Path("build/overhead.json"),
) -> None:
    """Make some comparisons (by default all), and write JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(output.read_text()) if output.exists() else {"comparisons": {}}
    for name in comparisons or COMPARISONS:
        title, policy, *servers = COMPARISONS[name]
        rounds = []
        for number in range(num_rounds):
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                subjects = {
                    server: Subject(stack.enter_context(running(server, folder)))
                    for server in servers[:: 1 if number % 2 else -1]
                }
                measures = [
                    functools.partial(subjects[server].measure, policy, concurrency, num_tokens)
                    for server in servers
                ]
                rounds.append(measure_pairs(*measures, num_pairs))
        title = f"{title}, {concurrency} requests of {num_tokens} tokens at a time"
        found["comparisons"][title] = summarize(rounds)
        print(title, json.dumps(found["comparisons"][title]), flush=True)
    found["machine"] = describe_machine()
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def running(name: str, folder: Path) -> contextlib.AbstractContextManager[Server]:
    """One of the servers."""
    config = folder / f"{name}.yaml"
    similarity = demo.CONFIG.with_name("similarity.safetensors")
    text = demo.CONFIG.read_text().replace(similarity.name, str(similarity))
    config.write_text(text + "statistics: false\n" * (name in UNCOUNTED))
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
