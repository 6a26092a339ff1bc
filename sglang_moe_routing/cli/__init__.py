"""The ``sglang-moe-routing`` command."""

from .app import app

__all__ = ["app"]
