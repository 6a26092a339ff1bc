"""Routing policies: what they are, how they are registered, and what they compute."""

from .base import FREE, PAD, Engagement, FreeSlots, Policy
from .budget import Budget
from .fit import Sizes, doubts, problems
from .oea import OEA
from .reference import Rerouted, reroute
from .registry import ENTRY_POINT_GROUP, PolicyRegistry, builtin_registry, installed_registry
from .rule import UNLIMITED, Place, Rule
from .schedule import MAX_ROWS, Count, Layers, Schedule, Similarity
from .scoring import Router
from .sere import SERE
from .table import WORDS, Capacity, Flag, PolicyTable, build_table, with_capacity
from .topk import TopK
from .torch_policy import Rows, TorchPolicy
from .vanilla import Vanilla
from .weights import Compensated, Mapped

__all__ = [
    "ENTRY_POINT_GROUP",
    "FREE",
    "MAX_ROWS",
    "OEA",
    "PAD",
    "SERE",
    "UNLIMITED",
    "WORDS",
    "Budget",
    "Capacity",
    "Compensated",
    "Count",
    "Engagement",
    "Flag",
    "FreeSlots",
    "Layers",
    "Mapped",
    "Place",
    "Policy",
    "PolicyRegistry",
    "PolicyTable",
    "Rerouted",
    "Router",
    "Rows",
    "Rule",
    "Schedule",
    "Similarity",
    "Sizes",
    "TopK",
    "TorchPolicy",
    "Vanilla",
    "build_table",
    "builtin_registry",
    "doubts",
    "installed_registry",
    "problems",
    "reroute",
    "with_capacity",
]
