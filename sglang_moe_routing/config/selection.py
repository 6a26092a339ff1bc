"""Which policy and isolation group a request gets: header, body and alias against the config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from ..errors import RoutingRequestError
from .schema import DEFAULT_GROUP, NAME_PATTERN, RoutingConfig

BODY_KEY = "moe_routing_policy"
"""Key in `custom_params` of a request body."""

GROUP_KEY = "moe_routing_group"
"""Key in `custom_params` of the isolation group. The server sets it; clients may not."""


def choose(
    config: RoutingConfig,
    *,
    headers: Sequence[str] = (),
    alias: str | None = None,
    body: object = None,
) -> str:
    """Name of the policy that a request runs under.

    A client names a policy by header, in the body, or as ``model@policy``; where it does so more
    than once, all must agree. A request that names none gets the config's default.

    Args:
        headers: every value of the policy header.
        alias: policy part of the model name.
        body: value of `BODY_KEY` in the body's ``custom_params``, None if absent.

    Raises:
        RoutingRequestError: malformed, unknown, not allowed, or contradictory.
    """
    if len(headers) > 1:
        raise RoutingRequestError(
            f"header {config.header} is given {len(headers)} times; send it once",
            reason="repeated_header",
        )
    sources = {
        f"header {config.header}": headers[0].strip(" \t") if headers else None,
        f"body field custom_params.{BODY_KEY}": body,
        "model alias": alias,
    }
    asked = {source: name for source, name in sources.items() if name is not None}
    for source, name in asked.items():
        _check(config, source, name)
    if len(set(asked.values())) > 1:
        listed = ", ".join(f"{source} says {name!r}" for source, name in asked.items())
        raise RoutingRequestError(
            f"contradictory MoE routing policies: {listed}; name one", reason="contradiction"
        )
    return str(next(iter(asked.values()), config.default))


def choose_group(config: RoutingConfig, policy: str, authorization: str | None) -> str:
    """Name of the isolation group of a request.

    Args:
        policy: its policy.
        authorization: value of its ``Authorization`` header, None if absent.

    Raises:
        RoutingRequestError: the config lists API keys, and this is none of them.
    """
    isolation = config.isolation
    scheme, _, key = (authorization or "").partition(" ")
    if isolation.api_keys and scheme.lower() == "bearer":
        group = isolation.api_keys.get(hashlib.sha256(key.encode()).hexdigest())
        if group is not None:
            return group
    if isolation.api_keys and isolation.other_keys == "refuse":
        raise RoutingRequestError(
            "this API key belongs to no group of the MoE routing config; send a listed key as "
            "'Authorization: Bearer'",
            reason="unknown_api_key",
            status=401,
        )
    return isolation.policies.get(policy, DEFAULT_GROUP)


def split_alias(config: RoutingConfig, model: str, served_model: str) -> tuple[str, str | None]:
    """Split ``model@policy`` into the model's own name and the policy.

    The served model's own name is never split, nor is a name without a policy part; a suffix
    that follows the served name (or one of its LoRA adapters) counts as a policy even if unknown.
    """
    base, at, policy = model.rpartition("@")
    if model == served_model or not at:
        return model, None
    if base == served_model or base.startswith(f"{served_model}:") or policy in config.names:
        return base, policy
    return model, None


def _check(config: RoutingConfig, source: str, name: object) -> None:
    available = f"available: {', '.join(config.choosable)}"
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise RoutingRequestError(
            f"malformed MoE routing policy {name!r:.200} in {source}: expected one policy name; "
            f"{available}",
            reason="malformed",
        )
    if name not in config.names:
        raise RoutingRequestError(
            f"unknown MoE routing policy {name!r} in {source}; {available}", reason="unknown"
        )
    if name not in config.choosable:
        raise RoutingRequestError(
            f"MoE routing policy {name!r} in {source} may not be chosen by clients; {available}",
            reason="not_allowed",
        )
