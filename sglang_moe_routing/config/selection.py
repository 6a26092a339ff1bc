"""Which policy and isolation group a request gets: header, body and alias against the config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import RoutingRequestError
from .schema import DEFAULT_GROUP, NAME_PATTERN, RoutingConfig

BODY_KEY = "moe_routing_policy"
"""Key of a request body, at its top level or in one of the objects of `BODY_PLACES`."""

_PLACES = ("", "custom_params", "sampling_params", "sampling_params.custom_params")
BODY_PLACES = (
    *_PLACES,
    *(f"parameters.{place}".rstrip(".") for place in _PLACES),
    "extra_body",
    "extra_body.custom_params",
    "metadata",
    "options",
)
"""Objects of a body in which `BODY_KEY` counts; elsewhere it is content, such as a schema's."""

BODY_ITEMS = "instances"
"""List of a body (Vertex) in whose objects `BODY_KEY` counts too."""

GROUP_KEY = "moe_routing_group"
"""Key in `custom_params` that clients may not set: the server decides about groups."""


def choose(
    config: RoutingConfig,
    *,
    headers: Sequence[tuple[str, str]] = (),
    alias: str | None = None,
    body: Sequence[tuple[str, object]] = (),
) -> str:
    """Name of the policy that a request runs under.

    A client names a policy by header, in the body, or as ``model@policy``; where it does so more
    than once, all must agree. A request that names none gets the config's default.

    Args:
        headers: name and value of every policy header. A value may be a list of names, as
            proxies make one of a header that came twice.
        alias: policy part of the model name.
        body: place and value of every `BODY_KEY` in the body.

    Raises:
        RoutingRequestError: malformed, unknown, not allowed, or contradictory.
    """
    asked: list[tuple[str, object]] = [
        (f"header {name}", item.strip(" \t"))
        for name, value in headers
        for item in value.split(",")
    ]
    asked += [(f"body field {place}", name) for place, name in body if name is not None]
    if alias is not None:
        asked.append(("model alias", alias))
    names = [_check(config, source, name) for source, name in asked]
    if len(set(names)) > 1:
        sources = dict.fromkeys(f"{source} says {name!r}" for source, name in asked)
        raise RoutingRequestError(
            f"contradictory MoE routing policies: {', '.join(sources)}; name one",
            reason="contradiction",
        )
    return names[0] if names else config.default


def find_in_body(body: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Place and value of every `BODY_KEY` that counts in a request's body."""
    for place in BODY_PLACES:
        found: object = body
        for key in filter(None, place.split(".")):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and BODY_KEY in found:
            yield f"{place}.{BODY_KEY}".lstrip("."), found[BODY_KEY]
    items = body.get(BODY_ITEMS)
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping) and BODY_KEY in item:
            yield f"{BODY_ITEMS}[].{BODY_KEY}", item[BODY_KEY]


def bearer_key(authorization: str | None) -> str:
    """The key of an ``Authorization: Bearer`` header, empty if there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def choose_group(config: RoutingConfig, policy: str, authorization: str | None) -> str:
    """Name of the isolation group of a request.

    Args:
        policy: its policy.
        authorization: value of its ``Authorization`` header, None if absent.

    Raises:
        RoutingRequestError: the config lists API keys, and this is none of them.
    """
    isolation = config.isolation
    key = bearer_key(authorization)
    if isolation.api_keys and key:
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

    The served model's own name, or the last part of its path, is never split. After it (or one of
    its LoRA adapters) every suffix counts as a policy: taken for a part of the name, a mistyped
    choice would go unnoticed. SGLang serves other names too; after those only a policy of the
    config counts. Case does not matter, but to policies.
    """
    served = served_model.lower().rstrip("/")
    own = (served, served.rpartition("/")[2])
    base, at, policy = model.rpartition("@")
    if not at or model.lower() in own:
        return model, None
    is_served = base.lower() in own or base.lower().startswith(tuple(f"{name}:" for name in own))
    return (base, policy) if is_served or policy in config.names else (model, None)


def _check(config: RoutingConfig, source: str, name: object) -> str:
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
    return name
