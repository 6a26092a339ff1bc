"""Hooks on a scheduler's requests to and from other processes."""

from ....engine.hooking import Hook
from . import internal_state, reload, request, weights

HOOKS: tuple[Hook, ...] = (request.HOOK, internal_state.HOOK, reload.HOOK, *weights.HOOKS)
