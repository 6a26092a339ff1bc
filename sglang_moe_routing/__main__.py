"""``python -m sglang_moe_routing`` is the ``sglang-moe-routing`` command."""

from .cli import app

app()
