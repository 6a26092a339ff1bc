"""After ``build_endpoint_weight_version_metadata``: the applied policy in OpenAI bodies.

SGLang's OpenAI responses carry a free ``metadata`` object, filled from ``meta_info`` here.
Streams have no such object; their response header says it.
"""

from __future__ import annotations

from typing import Any

from ...config import BODY_KEY
from ..hooking import Hook


def after(result: Any, meta_info: dict[str, Any]) -> Any:
    if BODY_KEY not in meta_info:
        return result
    return {**(result or {}), BODY_KEY: meta_info[BODY_KEY]}


HOOK = Hook(
    target="sglang.srt.utils.weight_versions.build_endpoint_weight_version_metadata",
    parameters=("meta_info",),
    kind="after",
    function=after,
    main_only=True,
)
