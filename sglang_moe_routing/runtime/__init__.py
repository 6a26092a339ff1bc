"""Routing in a running process: policy ids, plans of forwards, buffers, counts. Knows no engine."""

from .model import ServedModel
from .plan import Layer, Plan
from .process import Process, current, digests, start, used_artifacts

__all__ = [
    "Layer",
    "Plan",
    "Process",
    "ServedModel",
    "current",
    "digests",
    "start",
    "used_artifacts",
]
