"""Compiled kernels for the re-routing: built on first use, chosen once."""

from ..policies import MAX_ROWS
from .limits import MAX_EXPERTS, MAX_GROUPS, MAX_TOP_K, beyond_limits, written_in_torch
from .native import (
    CHOICE,
    REFERENCE,
    TARGET_ARCHITECTURES,
    Implementation,
    build_cpu,
    build_cuda,
    choose,
)
from .ops import NOT_COUNTED, BoundLayer, refine, workspace

__all__ = [
    "CHOICE",
    "MAX_EXPERTS",
    "MAX_GROUPS",
    "MAX_ROWS",
    "MAX_TOP_K",
    "NOT_COUNTED",
    "REFERENCE",
    "TARGET_ARCHITECTURES",
    "BoundLayer",
    "Implementation",
    "beyond_limits",
    "build_cpu",
    "build_cuda",
    "choose",
    "refine",
    "workspace",
    "written_in_torch",
]
