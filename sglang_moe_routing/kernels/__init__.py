"""Compiled kernels for the re-routing: built on first use, chosen once."""

from ..policies import MAX_ROWS
from .native import (
    CACHE,
    CHOICE,
    REFERENCE,
    TARGET_ARCHITECTURES,
    Implementation,
    build_cpu,
    build_cuda,
    choose,
)
from .ops import NOT_COUNTED, BoundLayer, refine, workspace
from .table import KernelTable, Room, compile_table, unsupported, with_room

__all__ = [
    "CACHE",
    "CHOICE",
    "MAX_ROWS",
    "NOT_COUNTED",
    "REFERENCE",
    "TARGET_ARCHITECTURES",
    "BoundLayer",
    "Implementation",
    "KernelTable",
    "Room",
    "build_cpu",
    "build_cuda",
    "choose",
    "compile_table",
    "refine",
    "unsupported",
    "with_room",
    "workspace",
]
