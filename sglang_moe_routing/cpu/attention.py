"""Latent attention (DeepSeek) on torch's attention backend.

SGLang has no entry for ``torch_native`` and falls back to a method that projects keys and values
for prefill, which this backend then does not find in the latent KV pool.
"""

from __future__ import annotations

from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)


def register() -> None:
    """Use absorbed latent attention for every phase; it reads and writes the latent pool."""
    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)
