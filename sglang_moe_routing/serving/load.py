"""Send concurrent requests under named policies and measure them, through the OpenAI API."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI

from ..config import DEFAULT_HEADER
from ..errors import EngineError, RoutingRequestError

TIMEOUT_S = 600.0
COUNTS = ("calls", "rows", "active_experts", "active_experts_base")
"""What a server counts of every MoE layer."""


@dataclass(frozen=True)
class Job:
    """One request to send."""

    prompt: str
    policy: str


@dataclass(frozen=True)
class Answer:
    """One request that was answered.

    Attributes:
        applied: policy that the server says it applied.
        num_tokens: completion tokens.
        tpot_s: seconds per output token after the first; None for answers of one token.
        ttft_s: seconds to the first token.
    """

    job: Job
    text: str
    applied: str
    num_tokens: int
    tpot_s: float | None
    ttft_s: float


@dataclass(frozen=True)
class ActiveExperts:
    """Mean active experts per MoE layer and decode step: as run, and as the router had chosen."""

    final: float
    base: float


@dataclass(frozen=True)
class Load:
    """Outcome of one wave of concurrent requests."""

    answers: Sequence[Answer]
    duration_s: float
    active_experts: ActiveExperts | None

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.duration_s

    @property
    def tpot_ms(self) -> float:
        """Median time per output token over requests, in milliseconds."""
        times = [answer.tpot_s for answer in self.answers if answer.tpot_s is not None]
        return 1e3 * statistics.median(times) if times else float("nan")

    def figures(self) -> dict[str, float | None]:
        """What a command reports of it."""
        active = self.active_experts
        return {
            "requests": len(self.answers),
            "tokens": self.num_tokens,
            "active_experts": round(active.final, 3) if active else None,
            "active_experts_base": round(active.base, 3) if active else None,
            "tpot_ms": round(self.tpot_ms, 3),
        }


class LoadClient:
    """Sends waves of requests to one server.

    Args:
        url: server root, without ``/v1``.
        header: name of the policy header.
    """

    def __init__(self, url: str, *, header: str = DEFAULT_HEADER, api_key: str = "none") -> None:
        self._url = url.rstrip("/")
        self._header = header
        self._auth = {"Authorization": f"Bearer {api_key}"}
        self._openai = AsyncOpenAI(base_url=f"{self._url}/v1", api_key=api_key, timeout=TIMEOUT_S)

    async def run(self, jobs: Sequence[Job], *, max_tokens: int, temperature: float = 0.0) -> Load:
        """Send all `jobs` at once, on an empty prefix cache, and wait for every answer.

        Raises:
            openai.APIError, httpx.HTTPError: the server refused or failed.
        """
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._auth, timeout=TIMEOUT_S
        ) as http:
            (await http.post("/flush_cache")).raise_for_status()
            before = await read_counts(http)
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(self._send(job, max_tokens, temperature) for job in jobs)
            )
            duration = time.perf_counter() - start
            after = await read_counts(http)
        return Load(answers, duration, mean_active_experts(before, after))

    async def _send(self, job: Job, max_tokens: int, temperature: float) -> Answer:
        start = time.perf_counter()
        first = last = start
        pieces: list[str] = []
        num_tokens = 0
        raw = await self._openai.completions.with_raw_response.create(
            model="default",
            prompt=job.prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={self._header: job.policy},
            extra_body={"ignore_eos": True},
        )
        async for chunk in raw.parse():
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
            if chunk.choices:
                last = time.perf_counter()
                first = last if not pieces else first
                pieces.append(chunk.choices[0].text)
        return Answer(
            job=job,
            text="".join(pieces),
            applied=raw.headers.get(self._header, ""),
            num_tokens=num_tokens,
            tpot_s=(last - first) / (num_tokens - 1) if num_tokens > 1 else None,
            ttft_s=first - start,
        )


def wanted_policies(
    wanted: str | None, known: Sequence[str], unknown: str = "is not in the config; choosable"
) -> list[str]:
    """What ``--policies`` names, all if absent. An unknown name should not cost a server's start.

    Args:
        known: names of the policies that clients may choose.
        unknown: what to say of a name that is not among them.

    Raises:
        RoutingRequestError: a name is not known.
    """
    names = [name.strip() for name in wanted.split(",")] if wanted else list(known)
    for name in names:
        if name not in known:
            raise RoutingRequestError(
                f"policy {name!r} {unknown}: {', '.join(known)}", reason="unknown"
            )
    return names


def served_policies(
    url: str, *, wanted: str | None = None, api_key: str = "none"
) -> tuple[str, list[str]]:
    """Name of the policy header of a running server, and policies to send under.

    Args:
        wanted: names separated by commas; None takes all that clients may choose.

    Raises:
        EngineError: the server serves no policies.
        RoutingRequestError: it does not let clients choose one of those wanted.
        httpx.HTTPError: it refused or failed.
    """
    response = httpx.get(
        f"{url.rstrip('/')}/v1/moe_routing/policies",
        headers={"Authorization": f"Bearer {api_key}"},
        timeout=30,
    )
    if response.status_code == httpx.codes.NOT_FOUND:
        raise EngineError(f"the server at {url} serves no MoE routing policies")
    response.raise_for_status()
    listing = response.json()
    known = [policy["id"] for policy in listing["data"] if policy["choosable"]]
    return listing["header"], wanted_policies(wanted, known, "is not served; available")


async def read_counts(http: httpx.AsyncClient) -> Mapping[str, int] | None:
    """Sums over MoE layers and workers since the server's start; None if it keeps none.

    Args:
        http: client whose base URL is the server's root.

    Returns:
        The server's own counts, and `layers`, the number of MoE layers.
    """
    response = await http.get("/v1/moe_routing/statistics")
    if response.status_code == httpx.codes.NOT_FOUND:
        return None
    response.raise_for_status()
    workers = [worker["layers"] or () for worker in response.json()["data"]]
    layers = [layer for worker in workers for layer in worker]
    if not layers:
        return None
    sums = {name: sum(layer[name] for layer in layers) for name in COUNTS}
    return sums | {"layers": max(map(len, workers))}


def mean_active_experts(
    before: Mapping[str, int] | None, after: Mapping[str, int] | None
) -> ActiveExperts | None:
    """Means between two readings of the counts; None without readings or steps."""
    if before is None or after is None or after["calls"] == before["calls"]:
        return None
    calls = after["calls"] - before["calls"]
    return ActiveExperts(
        final=(after["active_experts"] - before["active_experts"]) / calls,
        base=(after["active_experts_base"] - before["active_experts_base"]) / calls,
    )
