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
from .ops import refine, refine_out, workspace
from .table import KernelTable, Room, compile_table, unsupported, with_room

__all__ = [
    "CACHE",
    "CHOICE",
    "MAX_ROWS",
    "REFERENCE",
    "TARGET_ARCHITECTURES",
    "Implementation",
    "KernelTable",
    "Room",
    "build_cpu",
    "build_cuda",
    "choose",
    "compile_table",
    "refine",
    "refine_out",
    "unsupported",
    "with_room",
    "workspace",
]
