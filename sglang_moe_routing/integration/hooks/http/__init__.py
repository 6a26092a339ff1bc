"""Hooks that act in the process with the HTTP server or the offline engine."""

from ....engine.hooking import Hook
from . import endpoints, generate, internal_state, response, server

HOOKS: tuple[Hook, ...] = (
    generate.GENERATE,
    generate.REPORT,
    internal_state.HOOK,
    *endpoints.HOOKS,
    *response.HOOKS,
    *server.HOOKS,
)
