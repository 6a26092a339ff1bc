"""Entry points that SGLang loads. Stdlib only: SGLang swallows import errors of this module."""

from __future__ import annotations

import os

from .. import environment
from ..engine.fatal import fatal


def register() -> None:
    """Attach our hooks (entry point group ``sglang.srt.plugins``).

    Nothing is touched unless a routing config or the portable CPU platform is asked for.
    """
    is_configured = bool(os.environ.get(environment.CONFIG))
    if not is_configured and os.environ.get("SGLANG_PLATFORM") != environment.PLATFORM:
        return
    try:
        environment.require_home(os.environ)
        from .install import install

        install()
    except Exception as error:
        fatal(error)
