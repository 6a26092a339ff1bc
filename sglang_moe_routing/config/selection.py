"""Which policy a request gets: header, body and model alias against the config."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import RoutingRequestError
from .schema import NAME_PATTERN, RoutingConfig

BODY_KEY = "moe_routing_policy"
"""Key in `custom_params` of a request body."""


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
            f"header {config.header} is given {len(headers)} times; send it once"
        )
    sources = {
        f"header {config.header}": headers[0].strip() if headers else None,
        f"body field custom_params.{BODY_KEY}": body,
        "model alias": alias,
    }
    asked = {source: name for source, name in sources.items() if name is not None}
    for source, name in asked.items():
        _check(config, source, name)
    if len(set(asked.values())) > 1:
        listed = ", ".join(f"{source} says {name!r}" for source, name in asked.items())
        raise RoutingRequestError(f"contradictory MoE routing policies: {listed}; name one")
    return str(next(iter(asked.values()), config.default))


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
            f"malformed MoE routing policy {name!r} in {source}: expected one policy name; "
            f"{available}"
        )
    if name not in config.names:
        raise RoutingRequestError(f"unknown MoE routing policy {name!r} in {source}; {available}")
    if name not in config.choosable:
        raise RoutingRequestError(
            f"MoE routing policy {name!r} in {source} may not be chosen by clients; {available}"
        )
