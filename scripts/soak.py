"""Keep a real server under mixed load for a while, and check that it stays right and lean.

    python scripts/soak.py                                          # 30 s at 1, 16, 64 and 256
    python scripts/soak.py --concurrency 64 --seconds 600           # ten minutes at 64
    python scripts/soak.py --reload-every 5                         # with a reload every 5 s

Starts a server on loopback with a KV pool too small for the load, so that requests are retracted.
Requests are drawn from a seed: every policy, named in every way, on three endpoints, streamed or
not, short and long, n = 1 and 2, some given up in mid-stream and some refused. Every answer must
carry the policy it asked for and have every token. Between levels the server must fall idle, hold
no KV, have all its processes, and have counted the decode rows that the answers imply: exactly,
where nothing was given up or retracted. While it runs, SGLang checks the accounts and the pages of
its KV pool after every step. With `--reload-every`, the config changes and is reloaded meanwhile:
every other version asks for one expert more in each `oea` policy and has one policy more. Status 1,
with the problems, if anything is wrong.

Writes docs/bench/soak.json. Takes levels times seconds and two to three minutes more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from sglang_moe_routing import demo
from sglang_moe_routing.bench.machine import describe_machine
from sglang_moe_routing.bench.server import Server, running_server
from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import EngineError

OUT = Path(__file__).resolve().parents[1] / "docs" / "bench" / "soak.json"
MODEL_NAME = "demo"
UNKNOWN = "no-such-policy"
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
MAX_TOKENS = (1, 2, 5, 16, 32, 64, 128)
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

CANCELLED_SHARE = 0.2
"""Of the requests of at least CANCELLED_TOKENS."""
CANCELLED_TOKENS = 16
REFUSED_SHARE = 0.05
REQUEST_TIMEOUT_S = 300.0
IDLE_TIMEOUT_S = 120.0
METRICS_TIMEOUT_S = 15.0
METRICS = "sglang_moe_routing_"
EXACT_REQUESTS = 32
EXACT_CONCURRENCY = 4
EXACT_MAX_TOKENS = (1, 2, 5, 16, 32)
"""So few and short requests that a small pool holds them."""
SAMPLE_EVERY_S = 1.0
MAX_SAMPLES = 240
MAX_PROBLEMS = 20
NEVER_MORE_ACTIVE = {"vanilla", "topk", "oea", "sere"}
"""Kinds that run no expert which the batch's own routing would not have run."""

FAULTS = re.compile(
    r"Traceback|leak detected|Scheduler hit an exception|use-after-free|double free"
)
RETRACTED = re.compile(r"KV cache pool is full\. Retract requests\. #retracted_reqs: (\d+)")

console = Console(width=None if sys.stdout.isatty() else 120)


# Requests


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        policy: what must be applied.
        way: how it is named: header, body, alias or none.
        cancel_after: events after which the client closes the connection.
        refusal: what the error of status 400 must say; None for requests to be served.
    """

    path: str
    policy: str
    way: str
    stream: bool
    n: int
    max_tokens: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    cancel_after: int | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Served:
    """What the server says about its policies."""

    header: str
    default: str
    names: Sequence[str]
    kinds: Mapping[str, str]


def draw(rng: random.Random, served: Served, prompts: Sequence[str], *, exact: bool) -> Ask:
    """The next request.

    Args:
        exact: it is short, and is not given up.
    """
    path = rng.choice(PATHS)
    policy = rng.choice(served.names)
    ways = ["header", "body"] + ["alias"] * (path != "/generate")
    way = rng.choice(ways + ["none"] * (policy == served.default))
    max_tokens = rng.choice(EXACT_MAX_TOKENS if exact else MAX_TOKENS)
    stream, n = rng.random() < 0.5, 2 if rng.random() < 0.15 else 1
    cancel_after = None
    if not exact and max_tokens >= CANCELLED_TOKENS and rng.random() < CANCELLED_SHARE:
        stream, cancel_after = True, rng.randint(1, max_tokens // 2)
    names, refusal = {way: policy} if way != "none" else {}, None
    if rng.random() < REFUSED_SHARE:
        names, refusal = _bad_names(rng, way, policy, served)
    body = _body(rng, path, prompts, stream=stream, n=n, max_tokens=max_tokens)
    headers = {served.header: names["header"]} if "header" in names else {}
    if "body" in names:
        target = body["sampling_params"] if path == "/generate" else body
        target["custom_params"] = {"moe_routing_policy": names["body"]}
    if "alias" in names:
        body["model"] = f"{MODEL_NAME}@{names['alias']}"
    return Ask(path, policy, way, stream, n, max_tokens, headers, body, cancel_after, refusal)


def _bad_names(
    rng: random.Random, way: str, policy: str, served: Served
) -> tuple[dict[str, Any], str]:
    other = next(name for name in (*served.names, UNKNOWN) if name != policy)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"header" if way == "none" else way: UNKNOWN}, f"unknown MoE routing policy '{UNKNOWN}'"),
        ({"body": 3}, "malformed MoE routing policy 3"),
    ]
    if other != UNKNOWN:
        bad.append(({"header": policy, "body": other}, "contradictory MoE routing policies"))
    return rng.choice(bad)


def _body(
    rng: random.Random, path: str, prompts: Sequence[str], *, stream: bool, n: int, max_tokens: int
) -> dict[str, Any]:
    """Body of a request that ends after `max_tokens`, not before.

    A minimum keeps it from ending. With `ignore_eos` SGLang would reserve KV for every token to
    come and never retract.
    """
    text = _prompt(rng, prompts)
    if path == "/generate":
        lengths = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
        sampling = {**lengths, "n": n, "temperature": 1.0}
        return {"text": text, "sampling_params": sampling, "stream": stream}
    chat = {"messages": [{"role": "user", "content": text}]}
    body = {"model": MODEL_NAME, "max_tokens": max_tokens, "min_tokens": max_tokens}
    body |= {"n": n, "stream": stream, "temperature": 1.0}
    body |= chat if "chat" in path else {"prompt": text}
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


def _prompt(rng: random.Random, prompts: Sequence[str]) -> str:
    """One line or five; half of them start like no other, so that no cached prefix fits."""
    lines = rng.sample(prompts, 5 if rng.random() < 0.2 else 1)
    start = f"{rng.randrange(10**6)} " if rng.random() < 0.5 else ""
    return start + " ".join(lines)


# Answers


@dataclass
class Reply:
    """What came back.

    Attributes:
        bodies: the answer, or the events of a stream.
        ended: a stream's last event was the end mark.
        times: when each event came.
        broken: why there is no whole answer, if the client did not leave.
    """

    status: int = 0
    policy: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    cancelled: bool = False
    times: list[float] = field(default_factory=list)
    broken: str = ""


@dataclass(frozen=True)
class Outcome:
    """A request with what came of it: completed, cancelled, refused or failed."""

    ask: Ask
    kind: str
    problems: Sequence[str]
    ttft_s: float | None = None
    tpot_s: float | None = None


def judge(ask: Ask, reply: Reply) -> list[str]:
    """What is wrong with an answer."""
    if reply.broken:
        return [reply.broken]
    if ask.refusal is not None:
        return _judge_refusal(ask.refusal, reply)
    if reply.status != httpx.codes.OK:
        return [f"status {reply.status}: {reply.bodies}"]
    found = []
    if reply.policy != ask.policy:
        found.append(f"header names policy {reply.policy!r} instead of {ask.policy!r}")
    for name in named_policies(ask, reply):
        if name != ask.policy:
            found.append(f"body names policy {name!r} instead of {ask.policy!r}")
            break
    errors = [body["error"] for body in reply.bodies if "error" in body]
    found += [f"error in the stream: {error}" for error in errors]
    if reply.cancelled or found:
        return found
    if ask.stream and not reply.ended:
        found.append("the stream has no end")
    tokens, ends = count_tokens(ask, reply)
    if tokens != ask.n * ask.max_tokens:
        found.append(f"{tokens} tokens instead of {ask.n} times {ask.max_tokens}")
    if ends != ["length"] * ask.n:
        found.append(f"finish reasons {ends}")
    return found


def _judge_refusal(refusal: str, reply: Reply) -> list[str]:
    message = "".join(str(body.get("message", body)) for body in reply.bodies)
    if reply.status != httpx.codes.BAD_REQUEST or not message.startswith(refusal):
        return [f"status {reply.status}, {message!r} instead of 400, {refusal!r}"]
    return []


def named_policies(ask: Ask, reply: Reply) -> list[str | None]:
    """Policies in the bodies, where they belong: OpenAI's streams have them in the header only."""
    if ask.path == "/generate":
        return [info.get("moe_routing_policy") for info in _meta_infos(reply)]
    if ask.stream:
        return []
    return [(body.get("metadata") or {}).get("moe_routing_policy") for body in reply.bodies]


def count_tokens(ask: Ask, reply: Reply) -> tuple[int, list[str]]:
    """Completion tokens, and the reason why each choice ended."""
    if ask.path == "/generate":
        infos = [info for info in _meta_infos(reply) if info["finish_reason"]]
        ends = [info["finish_reason"]["type"] for info in infos]
        return sum(info["completion_tokens"] for info in infos), ends
    usages = [body["usage"] for body in reply.bodies if body.get("usage")]
    choices = [choice for body in reply.bodies for choice in body["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return usages[-1]["completion_tokens"] if usages else 0, ends


def _meta_infos(reply: Reply) -> list[dict[str, Any]]:
    return [body.get("meta_info", {}) for body in reply.bodies]


async def send(http: httpx.AsyncClient, ask: Ask, header: str) -> Outcome:
    """Send one request and judge the answer."""
    reply, start = Reply(), time.perf_counter()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await _receive(http, ask, header, reply)
    except (httpx.HTTPError, TimeoutError, ValueError) as error:
        reply.broken = f"no whole answer: {error!r}"
    try:
        problems = judge(ask, reply)
    except (KeyError, TypeError, AttributeError) as error:
        problems = [f"unexpected answer, {error!r}: {reply.bodies[-1:]}"]
    if problems:
        where = f"{ask.path} {ask.policy} by {ask.way}, stream={ask.stream}, n={ask.n}"
        return Outcome(ask, "failed", [f"{where}: {problem}" for problem in problems])
    if ask.refusal is not None:
        return Outcome(ask, "refused", [])
    ttft, tpot = None, None
    if ask.stream and reply.times:
        ttft = reply.times[0] - start
        if ask.n == 1 and ask.max_tokens > 1 and not reply.cancelled:
            tpot = (reply.times[-1] - reply.times[0]) / (ask.max_tokens - 1)
    return Outcome(ask, "cancelled" if reply.cancelled else "completed", [], ttft, tpot)


async def _receive(http: httpx.AsyncClient, ask: Ask, header: str, reply: Reply) -> None:
    async with http.stream("POST", ask.path, json=ask.body, headers=ask.headers) as response:
        reply.status = response.status_code
        reply.policy = response.headers.get(header)
        if ask.stream and response.is_success:
            await _receive_events(response, ask, reply)
            return
        found = json.loads(await response.aread())
        reply.bodies = found if isinstance(found, list) else [found]


async def _receive_events(response: httpx.Response, ask: Ask, reply: Reply) -> None:
    async for line in response.aiter_lines():
        if not line:
            continue
        kind, _, data = line.partition(": ")
        if kind != "data" or reply.ended:
            raise ValueError(f"line {line!r} in a stream")
        if data == "[DONE]":
            reply.ended = True
            continue
        reply.bodies.append(json.loads(data))
        reply.times.append(time.perf_counter())
        if len(reply.bodies) == ask.cancel_after:
            reply.cancelled = True
            return  # leaving the response closes the connection


# The server


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


# Checks


@dataclass(frozen=True)
class Rows:
    """Bounds on the decode rows of every layer in a phase."""

    at_least: int
    at_most: int


def implied_rows(outcomes: Sequence[Outcome], retracted: int) -> Rows:
    """Decode rows that answers imply.

    The prompt's forward makes the first of m tokens, decode rows the other m - 1. A retracted
    request is prefilled again, which makes one more of them. A request that was given up has come
    to any number of rows.
    """
    done = [outcome.ask for outcome in outcomes if outcome.kind == "completed"]
    rows = sum(ask.n * (ask.max_tokens - 1) for ask in done)
    given_up = [outcome.ask for outcome in outcomes if outcome.kind in ("cancelled", "failed")]
    more = sum(ask.n * (ask.max_tokens - 1) for ask in given_up if ask.refusal is None)
    return Rows(max(0, rows - retracted), rows + more)


def check_counts(
    before: Reading, after: Reading, outcomes: Sequence[Outcome], served: Served
) -> list[str]:
    """What is wrong with the statistics of a phase."""
    bounds = implied_rows(outcomes, after.retracted - before.retracted)
    found = []
    layers = differences(before, after)
    if not layers or not all(layer["calls"] for layer in layers):
        found.append(f"a layer counted no calls: {layers}")
    for name in ("rows", "calls"):
        if len({layer[name] for layer in layers}) > 1:
            found.append(f"layers counted different {name}: {[layer[name] for layer in layers]}")
    bounded = {served.kinds[name] for name in served.names} <= NEVER_MORE_ACTIVE
    for layer in layers:
        if not bounds.at_least <= layer["rows"] <= bounds.at_most:
            found.append(
                f"layer {layer['layer']} counted {layer['rows']} decode rows; the answers imply "
                f"{bounds.at_least} to {bounds.at_most}"
            )
        if bounded and layer["active_experts"] > layer["active_experts_base"]:
            found.append(f"layer {layer['layer']} ran more experts than without policies: {layer}")
        if layer["critical_experts"] > layer["active_experts"] or layer["calls"] > layer["rows"]:
            found.append(f"layer {layer['layer']} has impossible counts: {layer}")
    return found


def check_metrics(
    before: Reading, after: Reading, outcomes: Sequence[Outcome], *, exact: bool
) -> list[str]:
    """What is wrong with this package's metrics of a phase.

    Args:
        exact: nothing was given up or retracted, so that every policy's rows are known.
    """
    found = []
    rows = {name: count - before.rows.get(name, 0) for name, count in after.rows.items()}
    counted = sum(layer["rows"] for layer in differences(before, after)[:1])
    if sum(rows.values()) != counted:
        found.append(f"the metrics have {rows} decode rows, the statistics {counted}")
    implied = Counter[str]()
    for outcome in outcomes:
        if outcome.kind == "completed":
            implied[outcome.ask.policy] += outcome.ask.n * (outcome.ask.max_tokens - 1)
    if exact and +Counter(rows) != +implied:
        found.append(f"the metrics have {rows} decode rows, the answers imply {dict(implied)}")
    refused = sum(outcome.kind == "refused" for outcome in outcomes)
    if after.rejected - before.rejected != refused:
        found.append(f"the metrics have {after.rejected - before.rejected} refusals, not {refused}")
    return found


def differences(before: Reading, after: Reading) -> list[dict[str, int]]:
    """Counts of every layer between two readings."""
    return [
        {name: new[name] - old[name] if name != "layer" else new[name] for name in new}
        for old, new in zip(before.layers, after.layers, strict=True)
    ]


def check_state(baseline: Reading, after: Reading) -> list[str]:
    """What is wrong with an idle server."""
    found = []
    if after.used_tokens != baseline.used_tokens:
        found.append(
            f"{after.used_tokens} KV tokens are in use while idle, {baseline.used_tokens} at first"
        )
    if after.retracted != after.retracted_metric:
        found.append(
            f"{after.retracted} retractions in the log, {after.retracted_metric} in the metrics"
        )
    gone = set(baseline.rss_mib) - set(after.rss_mib)
    if gone:
        found.append(f"processes ended: {', '.join(sorted(gone))}")
    return found


def check_growth(
    warm: Mapping[str, float], end: Mapping[str, float], num_requests: int, bound_mib: float
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Growth of every process after the warm-up, and what of it is too much."""
    memory, found = {}, []
    for label, last in end.items():
        first = warm.get(label, 0.0)  # a process that came later grew from nothing
        growth = last - first
        memory[label] = {
            "warm_mib": first,
            "end_mib": last,
            "growth_mib": round(growth, 2),
            "growth_mib_per_1000_requests": round(1000 * growth / max(1, num_requests), 3),
        }
        if growth > bound_mib:
            found.append(
                f"{label} grew by {growth:.1f} MiB over {num_requests} requests, "
                f"more than {bound_mib:.0f}"
            )
    return memory, found


def check_log(text: str) -> list[str]:
    """Lines of the server's log that should not be there."""
    return [f"in the log: {line}" for line in text.splitlines() if FAULTS.search(line)]


# The soak


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
            summarize(phase, outcomes, duration, before, after) | {"problems": len(problems)}
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


def summarize(
    phase: Phase, outcomes: Sequence[Outcome], duration_s: float, before: Reading, after: Reading
) -> dict[str, Any]:
    """Figures of a phase."""
    asks = [outcome.ask for outcome in outcomes]
    done = [outcome for outcome in outcomes if outcome.kind == "completed"]
    tokens = sum(outcome.ask.n * outcome.ask.max_tokens for outcome in done)
    layers, retracted = differences(before, after), after.retracted - before.retracted
    bounds = implied_rows(outcomes, retracted)
    sums = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    calls = max(1, sums["calls"])
    return {
        "name": phase.name,
        "concurrency": phase.concurrency,
        "seconds": round(duration_s, 1),
        "requests": len(asks),
        "outcomes": Counter(outcome.kind for outcome in outcomes),
        "policies": Counter(ask.policy for ask in asks),
        "named_by": Counter(ask.way for ask in asks),
        "endpoints": Counter(ask.path for ask in asks),
        "streamed": sum(ask.stream for ask in asks),
        "with_n_2": sum(ask.n == 2 for ask in asks),
        "tokens": tokens,
        "tokens_per_s": round(tokens / duration_s, 1),
        "requests_per_s": round(len(asks) / duration_s, 2),
        "tpot_ms": percentiles([outcome.tpot_s for outcome in done]),
        "ttft_ms": percentiles([outcome.ttft_s for outcome in done]),
        "retractions": retracted,
        "rows": [layer["rows"] for layer in layers],
        "rows_implied": [bounds.at_least, bounds.at_most],
        "rows_per_step": round(sums["rows"] / calls, 2),
        "active_experts": round(sums["active_experts"] / calls, 2),
        "active_experts_base": round(sums["active_experts_base"] / calls, 2),
        "used_tokens_when_idle": after.used_tokens,
        "rss_mib": dict(after.rss_mib),
    }


def percentiles(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Percentiles in milliseconds; None for fewer than two values."""
    known = [1e3 * value for value in seconds if value is not None]
    if len(known) < 2:
        return None
    cuts = statistics.quantiles(known, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 1) for p in (50, 90, 99)}


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
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S)
    warm, warm_s, warm_requests = {}, 0.0, 0
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
    memory, grown = {}, []
    if warm:
        memory, grown = check_growth(warm, end, num_requests, args.max_growth_mib)
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


def show(result: Mapping[str, Any]) -> None:
    """Tables of the phases and of memory, and the problems."""
    columns = ("phase", "requests", "given up", "refused", "failed", "retracted", "tokens/s")
    table = Table(*columns, "TPOT p50, p99 (ms)", "rows", "implied")
    for phase in result["phases"]:
        outcomes, tpot = phase["outcomes"], phase["tpot_ms"]
        kinds = [str(outcomes.get(kind, 0)) for kind in ("cancelled", "refused", "failed")]
        cells = [phase["retractions"], phase["tokens_per_s"]]
        cells += [f"{tpot['p50']}, {tpot['p99']}" if tpot else "", max(phase["rows"])]
        low, high = phase["rows_implied"]
        implied = str(low) if low == high else f"{low} to {high}"
        table.add_row(phase["name"], str(phase["requests"]), *kinds, *map(str, cells), implied)
    console.print(table)
    names = ("warm_mib", "end_mib", "growth_mib_per_1000_requests", "slope_mib_per_minute")
    table = Table("process", "warm (MiB)", "end (MiB)", "per 1000 requests", "per minute")
    for label, figures in result["memory"].items():
        table.add_row(label, *(str(figures.get(name, "")) for name in names))
    console.print(table)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False)
    verdict = f"{len(result['problems'])} problems" if result["problems"] else "no problems"
    console.print(f"{verdict}, {sum(phase['requests'] for phase in result['phases'])} requests")


def report(result: Mapping[str, Any], out: Path) -> int:
    """Write and show a result.

    Returns:
        The command's status.
    """
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 1 if result["problems"] else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=30.0, help="of every level")
    parser.add_argument("--warm-up-seconds", type=float, default=20.0)
    parser.add_argument("--max-requests", type=int, default=100_000, help="of every level")
    parser.add_argument("--routing-config", type=Path, default=demo.CONFIG)
    parser.add_argument("--policies", nargs="+", default=[], help="default: all choosable")
    parser.add_argument("--max-total-tokens", type=int, default=4096, help="the KV pool")
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument("--max-growth-mib", type=float, default=64.0, help="of every process")
    parser.add_argument("--reload-every", type=float, help="seconds; never by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the server's log here")
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
    sys.exit(report({"settings": settings, "machine": describe_machine()} | result, args.out))


if __name__ == "__main__":
    main()
