"""SGLang's router.

Before ``_post_process_topk_ids``: the re-routing itself.

Why here: the last point where ids are logical, weights and all router logits are at hand and the
layer is known; before SGLang captures routed experts, maps them to physical ones, masks padding
and appends shared experts. Every router family of the STANDARD format passes by.
Goes when SGLang offers a routing hook of its own.

After ``select_experts``: what it hands on must be what was re-routed, by the router that we know.

Before ``build_precomputed_topk_output``: a fused router that never comes to the hook.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .... import runtime
from ....engine.hooking import Hook
from ....errors import EngineError
from ...marks import LAYER


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
        runtime.current().model.reroute(layer, topk_ids, topk_weights, router_logits)


def after_select(
    result: Any,
    hidden_states: Tensor,
    router_logits: Tensor,
    topk_config: Any,
    *,
    dynamic_expert_bias: Tensor | None = None,
    **kwargs: Any,
) -> None:
    layer = getattr(topk_config, LAYER, None)
    if layer is None:
        return
    if hasattr(result, "packed_topk_ids"):
        raise EngineError(
            f"layer {layer.layer_id}: SGLang packed the expert ids before they were re-routed; "
            "set SGLANG_OPT_LORA_FUSED_TOPK_PACK=0, or add --moe-runner-backend triton"
        )
    if dynamic_expert_bias is not None:
        raise EngineError(
            f"layer {layer.layer_id}: a router bias that depends on the token is not supported"
        )


def before_precomputed(
    topk_weights: Tensor, topk_ids: Tensor, topk_config: Any, layer_id: int
) -> None:
    if hasattr(topk_config, LAYER):
        raise EngineError(
            f"layer {layer_id}: a fused router chose the experts, past the re-routing; "
            "set SGLANG_K3_FUSED_FRONT=0"
        )


HOOK = Hook(
    target="sglang.srt.layers.moe.topk._post_process_topk_ids",
    kind="before",
    function=before,
)
SELECT = Hook(
    target="sglang.srt.layers.moe.topk.select_experts",
    kind="after",
    function=after_select,
)
PRECOMPUTED = Hook(
    target="sglang.srt.layers.moe.topk.build_precomputed_topk_output",
    kind="before",
    function=before_precomputed,
)
