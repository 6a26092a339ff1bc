"""Routing in a running process: policy ids, plans of forwards, buffers, counts. Knows no engine."""

from .plan import Call, Layer, Plan
from .process import Runtime, current, start, used_artifacts

__all__ = ["Call", "Layer", "Plan", "Runtime", "current", "start", "used_artifacts"]
