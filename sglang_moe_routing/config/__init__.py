"""Routing configs: their schema, how they are read, and how a request picks a policy."""

from .loader import LoadedConfig, bundled_config, load_config
from .schema import DEFAULT_HEADER, VANILLA, RoutingConfig, json_schema, model_for
from .selection import BODY_KEY, choose, split_alias

__all__ = [
    "BODY_KEY",
    "DEFAULT_HEADER",
    "VANILLA",
    "LoadedConfig",
    "RoutingConfig",
    "bundled_config",
    "choose",
    "json_schema",
    "load_config",
    "model_for",
    "split_alias",
]
