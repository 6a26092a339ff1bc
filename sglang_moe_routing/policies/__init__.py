"""Routing policies: what they are, how they are registered, and what they compute."""

from .base import (
    FREE,
    MAX_ROWS,
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
from .fit import Sizes, doubts, problems
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
    "MAX_ROWS",
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
    "Sizes",
    "TopK",
    "Vanilla",
    "build_table",
    "builtin_registry",
    "doubts",
    "installed_registry",
    "problems",
    "reroute",
]
