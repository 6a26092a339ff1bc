"""Hooks on what a scheduler runs: batches, graphs, the router of a layer."""

from ....engine.hooking import Hook
from . import capture, forcing, forward, forward_batch, graphs, load_model, topk

HOOKS: tuple[Hook, ...] = (
    topk.HOOK,
    topk.SELECT,
    topk.PRECOMPUTED,
    capture.HOOK,
    forward_batch.HOOK,
    forward.HOOK,
    graphs.CAPTURE,
    graphs.CAPTURE_SHAPE,
    graphs.PREFILL,
    load_model.HOOK,
)

FORCING_HOOKS: tuple[Hook, ...] = forcing.HOOKS
"""Registered on request only."""
