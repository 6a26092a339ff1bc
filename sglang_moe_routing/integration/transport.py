"""How the choice of a request travels to the scheduler: packed into its ``custom_params``.

`SamplingParams.custom_params` is the one carrier that survives batches, n > 1, IPC, sessions and
retraction. What the client put there is the client's: custom logit processors get exactly that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BODY_KEY, DEFAULT_GROUP, GROUP_KEY

KEY = "__sglang_moe_routing"
_POLICY, _GROUP, _IS_BARE = "policy", "group", "is_bare"


@dataclass(frozen=True)
class Choice:
    """Names of the policy and the isolation group of one item of a request."""

    policy: str
    group: str = DEFAULT_GROUP


def pack(given: Mapping[str, Any] | None, choice: Choice) -> dict[str, Any]:
    """Custom params that carry `choice` beside what the client has `given`."""
    given, _ = unpack(given)  # SGLang may hand one object in twice
    packed = {_POLICY: choice.policy, _GROUP: choice.group, _IS_BARE: given is None}
    return {**(given or {}), KEY: packed}


def unpack(custom: Any) -> tuple[Any, Choice | None]:
    """What the client gave, and the choice; None where nothing was packed."""
    packed = custom.get(KEY) if isinstance(custom, dict) else None
    if not isinstance(packed, dict):
        return custom, None
    given = {key: value for key, value in custom.items() if key != KEY}
    choice = Choice(str(packed.get(_POLICY)), str(packed.get(_GROUP)))
    return None if packed.get(_IS_BARE) and not given else given, choice


def without_choice(custom: Mapping[str, Any]) -> dict[str, Any]:
    """Custom params of a request that may choose nothing, whatever its client wrote."""
    return {k: v for k, v in custom.items() if k not in (KEY, BODY_KEY, GROUP_KEY)}


def packed_policy(sampling_params: Any) -> str | None:
    """Policy of a request in the HTTP process, of its first item if it has several."""
    first = sampling_params[0] if isinstance(sampling_params, list) else sampling_params
    _, choice = unpack(first.get("custom_params") if isinstance(first, dict) else None)
    return choice.policy if choice else None
