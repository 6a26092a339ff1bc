"""Routing configs: their schema, how they are read, and how a request picks a policy."""

from .fit import check_policies, check_torch_policies
from .loader import LoadedConfig, bundled_config, load_config
from .schema import DEFAULT_GROUP, DEFAULT_HEADER, VANILLA, RoutingConfig, json_schema, model_for
from .selection import (
    BODY_ITEMS,
    BODY_KEY,
    BODY_PLACES,
    GROUP_KEY,
    bearer_key,
    choose,
    choose_group,
    find_in_body,
    split_alias,
)

__all__ = [
    "BODY_ITEMS",
    "BODY_KEY",
    "BODY_PLACES",
    "DEFAULT_GROUP",
    "DEFAULT_HEADER",
    "GROUP_KEY",
    "VANILLA",
    "LoadedConfig",
    "RoutingConfig",
    "bearer_key",
    "bundled_config",
    "check_policies",
    "check_torch_policies",
    "choose",
    "choose_group",
    "find_in_body",
    "json_schema",
    "load_config",
    "model_for",
    "split_alias",
]
