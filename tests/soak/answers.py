"""Answers, and what is wrong with them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from .asks import Ask

TIMEOUT_S = 300.0


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
    """Policies in the bodies, where they belong: in the last events of OpenAI's streams."""
    if ask.path == "/generate":
        return [info.get("moe_routing_policy") for info in _meta_infos(reply)]
    extensions = [body.get("sglext", {}) for body in reply.bodies]
    return [e.get("moe_routing_policy") for e in extensions if e or not ask.stream]


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
        async with asyncio.timeout(TIMEOUT_S):
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
