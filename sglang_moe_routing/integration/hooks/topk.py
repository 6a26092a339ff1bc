"""Before ``_post_process_topk_ids``: the re-routing itself.

Why here: the last point where ids are logical, weights and all router logits are at hand and the
layer is known; before SGLang captures routed experts, maps them to physical ones, masks padding
and appends shared experts. Every router family of the STANDARD format passes by.
Goes when SGLang offers a routing hook of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import runtime
from ..hooking import Hook
from ..runtime import LAYER


def before(
    topk_ids: Tensor,
    topk_weights: Tensor,
    topk_config: Any,
    router_logits: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    layer = getattr(topk_config, LAYER, None)
    if layer is not None:
        layer.follow_bias(topk_config.correction_bias)
        runtime.current().reroute(layer, topk_ids, topk_weights, router_logits)


HOOK = Hook(
    target="sglang.srt.layers.moe.topk._post_process_topk_ids",
    parameters=(
        "topk_ids",
        "topk_weights",
        "topk_config",
        "router_logits",
        "layer_id",
        "num_token_non_padded",
        "expert_location_dispatch_info",
        "padded_rows_masked",
    ),
    kind="before",
    function=before,
)
