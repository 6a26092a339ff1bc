"""Routing policies: what they are, how they are registered, and what they compute."""

from .base import (
    FREE,
    PAD,
    Count,
    Engagement,
    FreeSlots,
    Layers,
    Parameters,
    Policy,
    Rows,
    Schedule,
    Similarity,
)
from .budget import Budget
from .oea import OEA
from .reference import Rerouted, reroute
from .registry import (
    ENTRY_POINT_GROUP,
    PolicyRegistry,
    builtin_registry,
    installed_registry,
)
from .scoring import Router
from .sere import SERE
from .table import PolicyTable, build_table
from .topk import TopK
from .vanilla import Vanilla

__all__ = [
    "ENTRY_POINT_GROUP",
    "FREE",
    "OEA",
    "PAD",
    "SERE",
    "Budget",
    "Count",
    "Engagement",
    "FreeSlots",
    "Layers",
    "Parameters",
    "Policy",
    "PolicyRegistry",
    "PolicyTable",
    "Rerouted",
    "Router",
    "Rows",
    "Schedule",
    "Similarity",
    "TopK",
    "Vanilla",
    "build_table",
    "builtin_registry",
    "installed_registry",
    "reroute",
]
