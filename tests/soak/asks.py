"""Requests: every policy, named in every way, on three endpoints, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODEL_NAME = "demo"
UNKNOWN = "no-such-policy"
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
MAX_TOKENS = (1, 2, 5, 16, 32, 64, 128)
EXACT_MAX_TOKENS = (1, 2, 5, 16, 32)
"""So short requests that a small pool holds a few of them."""
CANCELLED_SHARE = 0.2
"""Of the requests of at least CANCELLED_TOKENS."""
CANCELLED_TOKENS = 16
REFUSED_SHARE = 0.05


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
