"""Entry point that SGLang loads. Stdlib only: SGLang swallows import errors of this module."""

from __future__ import annotations

import os

from .. import environment


def activate() -> str | None:
    """Class of the portable CPU platform (entry point group ``sglang.srt.platforms``).

    Only on request: a platform that activates itself would win over CUDA.
    """
    if os.environ.get("SGLANG_PLATFORM") != environment.PLATFORM:
        return None
    return "sglang_moe_routing.cpu.platform.PortableCpuPlatform"
