"""Keep a real server under mixed load for a while, and check that it stays right and lean.

    python -m tests.soak                                          # 30 s at 1, 16, 64 and 256
    python -m tests.soak --concurrency 64 --seconds 600           # ten minutes at 64
    python -m tests.soak --reload-every 5                         # with a reload every 5 s

Starts a server on loopback with a KV pool too small for the load, so that requests are retracted.
Requests are drawn from a seed: every policy, named in every way, on three endpoints, streamed or
not, short and long, n = 1 and 2, some given up in mid-stream and some refused. Every answer must
carry the policy it asked for and have every token. Between levels the server must fall idle, hold
no KV, have all its processes, and have counted the decode rows that the answers imply: exactly,
where nothing was given up or retracted. While it runs, SGLang checks the accounts and the pages of
its KV pool after every step. With `--reload-every`, the config changes and is reloaded meanwhile:
every other version asks for one expert more in each `oea` policy and has one policy more. Status 1,
with the problems, if anything is wrong.

Writes build/soak.json. Takes levels times seconds and two to three minutes more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console

from sglang_moe_routing import demo
from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.serving.machine import describe_machine
from sglang_moe_routing.serving.server import Server, running_server

from .answers import TIMEOUT_S, Outcome, send
from .asks import MODEL_NAME, draw
from .checks import check_counts, check_growth, check_log, check_metrics, check_state
from .figures import report, summarize
from .readings import Watch, read_idle, read_served

OUT = Path(__file__).resolve().parents[2] / "build" / "soak.json"
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
"""SGLang ends the server when a step leaves its KV accounts or pages inconsistent."""
BOLD = {
    "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "10",
    "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "0",
    "SGLANG_RETRACT_DECODE_STEPS": "1",
}
"""SGLang fills the pool as if requests ended early, and soon again after a retraction."""

EXACT_REQUESTS = 32
EXACT_CONCURRENCY = 4
MAX_PROBLEMS = 20

console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Phase:
    """A stretch of load.

    Attributes:
        exact: nothing may be given up or retracted, so that the counts must fit exactly.
    """

    name: str
    concurrency: int
    seconds: float
    max_requests: int
    exact: bool = False


class Soak:
    """Runs phases on one server and keeps what they gave."""

    def __init__(self, http: httpx.AsyncClient, server: Server, watch: Watch) -> None:
        self._http, self._server, self._watch = http, server, watch
        self._prompts = demo.read_prompts()
        self.results: list[dict[str, Any]] = []
        self.problems: list[str] = []

    async def prepare(self, seed: int, policies: Sequence[str]) -> None:
        self._rng = random.Random(seed)
        self._served = await read_served(self._http, policies)
        self.baseline = self.last = await read_idle(self._http, self._server, self._watch)
        if not self.last.layers:
            raise EngineError("the config turns statistics off, which a soak checks")

    async def run(self, phase: Phase) -> None:
        """Load the server, wait until it is idle, check, record."""
        console.print(f"{phase.name}: {phase.concurrency} at a time", style="dim")
        start = time.perf_counter()
        outcomes = await self._load(phase)
        duration = time.perf_counter() - start
        problems = [problem for outcome in outcomes for problem in outcome.problems]
        before, after = self.last, await read_idle(self._http, self._server, self._watch)
        self.last = after
        problems += check_state(self.baseline, after)
        problems += check_counts(before, after, outcomes, self._served)
        problems += check_metrics(before, after, outcomes, exact=phase.exact)
        if phase.exact and after.retracted != before.retracted:
            problems.append("requests were retracted where none should be: enlarge the KV pool")
        self.results.append(
            {"name": phase.name, "concurrency": phase.concurrency}
            | summarize(outcomes, duration, before, after)
            | {"problems": len(problems)}
        )
        self.problems += [f"{phase.name}: {problem}" for problem in problems[:MAX_PROBLEMS]]

    async def _load(self, phase: Phase) -> list[Outcome]:
        deadline = time.monotonic() + phase.seconds
        numbers = iter(range(phase.max_requests))
        outcomes: list[Outcome] = []

        async def work() -> None:
            while time.monotonic() < deadline and next(numbers, None) is not None:
                ask = draw(self._rng, self._served, self._prompts, exact=phase.exact)
                outcomes.append(await send(self._http, ask, self._served.header))

        await asyncio.gather(*(work() for _ in range(phase.concurrency)))
        return outcomes

    async def finish(self) -> None:
        """Empty the cache, and see that the server is well."""
        flushed = await self._http.post("/flush_cache")
        if flushed.is_error:
            self.problems.append(f"the cache cannot be emptied: {flushed.text}")
        after = await read_idle(self._http, self._server, self._watch)
        self.problems += check_state(self.baseline, after)
        health = await self._http.get("/health")
        if health.is_error:
            self.problems.append(f"/health answers {health.status_code}")
        self.problems += check_log(self._server.log.read_text(errors="replace"))[:MAX_PROBLEMS]


def plan(args: argparse.Namespace) -> Iterator[Phase]:
    """An exact phase, a warm-up at the highest level, the levels, and an exact phase again."""
    exact = Phase("exact, at first", EXACT_CONCURRENCY, 120.0, EXACT_REQUESTS, exact=True)
    yield exact
    top = max(args.concurrency)
    yield Phase("warm-up", top, args.warm_up_seconds, args.max_requests)
    for level in args.concurrency:
        yield Phase(f"level {level}", level, args.seconds, args.max_requests)
    yield replace(exact, name="exact, at last")


class Reloader:
    """Changes the config and reloads it, again and again."""

    def __init__(self, http: httpx.AsyncClient, config: Path, every_s: float | None) -> None:
        self._http, self._config, self._every_s = http, config, every_s
        self._versions = itertools.cycle(versions(config.read_text()))
        self.num_done = 0
        self.problems: list[str] = []

    async def run(self) -> None:
        while self._every_s is not None:
            await asyncio.sleep(self._every_s)
            self._config.write_text(next(self._versions))
            try:
                answer = await self._http.post("/moe_routing/reload")
            except httpx.HTTPError as error:
                self.problems.append(f"reload: {error!r}")
                continue
            self.num_done += answer.is_success
            if answer.is_error:
                self.problems.append(f"reload: status {answer.status_code}: {answer.text}")


def versions(text: str) -> tuple[str, str]:
    """Another version of a config, and the config itself."""
    tree = yaml.safe_load(text)
    for policy in tree["policies"].values():
        if policy["kind"] == "oea" and isinstance(policy["k0"], int):
            policy["k0"] += 1
    tree["policies"]["soak-extra"] = {"kind": "topk", "k0": 1}
    return yaml.safe_dump(tree), text


@contextlib.asynccontextmanager
async def background(*works: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work()) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def soak(server: Server, config: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every phase, whatever the earlier ones found, until the server is lost."""
    watch = Watch(server)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(TIMEOUT_S)
    warm: dict[str, float] = {}
    warm_s, warm_requests = 0.0, 0
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=timeout) as http:
        run = Soak(http, server, watch)
        reloader = Reloader(http, config, args.reload_every)
        async with background(watch.run, reloader.run):
            try:
                await run.prepare(args.seed, args.policies)
                for phase in plan(args):
                    await run.run(phase)
                    if phase.name == "warm-up":
                        watch.sample()
                        warm_s, warm = watch.samples[-1]
                        warm_requests = sum(result["requests"] for result in run.results)
                await run.finish()
            except (EngineError, httpx.HTTPError) as error:
                run.problems.append(f"the server is lost: {error!r}")
        end = watch.read()
    num_requests = sum(result["requests"] for result in run.results) - warm_requests
    memory, grown = check_growth(warm, end if warm else {}, num_requests, args.max_growth_mib)
    for label, slope in watch.slopes(warm_s).items():
        memory.setdefault(label, {})["slope_mib_per_minute"] = slope
    return {
        "phases": run.results,
        "memory": memory,
        "memory_over_time": watch.thinned(),
        "requests_after_warm_up": num_requests,
        "reloads": reloader.num_done,
        "problems": run.problems + grown + reloader.problems,
    }


def server_flags(args: argparse.Namespace) -> list[str]:
    """SGLang's flags: a small pool, and the metrics that count retractions."""
    return [
        *("--served-model-name", MODEL_NAME, "--random-seed", str(args.seed)),
        *("--max-total-tokens", str(args.max_total_tokens)),
        *("--max-running-requests", str(args.max_running_requests)),
        "--enable-metrics",
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=30.0, help="Length of every level.")
    parser.add_argument("--warm-up-seconds", type=float, default=20.0)
    parser.add_argument(
        "--max-requests", type=int, default=100_000, help="Requests of every level."
    )
    parser.add_argument("--routing-config", type=Path, default=demo.CONFIG)
    parser.add_argument(
        "--policies", nargs="+", default=[], help="Names of policies; all choosable by default."
    )
    parser.add_argument("--max-total-tokens", type=int, default=4096, help="Size of the KV pool.")
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument(
        "--max-growth-mib", type=float, default=64.0, help="Allowed to every process."
    )
    parser.add_argument(
        "--reload-every", type=float, help="Seconds between reloads; none by default."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="Where to keep the server's log.")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def standing_alone(config: Path) -> str:
    """Text of a config whose artifacts are found from anywhere, and that may be reloaded."""
    loaded, tree = load_config(config), yaml.safe_load(config.read_text())
    tree["reload"] = {"http": "open"}
    for name, path in loaded.similarity_paths.items():
        tree["similarity"][name] = str(path)
    return yaml.safe_dump(tree)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # stops the server too
    with tempfile.TemporaryDirectory() as scratch:
        log = args.log or Path(scratch) / "server.log"
        console.print("starting the server", style="dim")
        config = Path(scratch) / "routing.yaml"
        config.write_text(standing_alone(args.routing_config))
        flags = server_flags(args)
        with running_server(
            demo.MODEL, config=config, flags=flags, environment=STRICT | BOLD, log=log
        ) as server:
            result = asyncio.run(soak(server, config, args))
    settings = {
        name: getattr(args, name)
        for name in (
            *("seed", "seconds", "warm_up_seconds"),
            *("max_requests", "max_growth_mib", "reload_every"),
        )
    } | {"server_flags": flags, "environment": STRICT | BOLD}
    sys.exit(
        report({"settings": settings, "machine": describe_machine()} | result, args.out, console)
    )


if __name__ == "__main__":
    main()
