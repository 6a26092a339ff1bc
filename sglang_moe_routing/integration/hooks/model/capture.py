"""Around ``capture_routed_experts_if_allowed``: ids that a consumer of routed experts can use.

Why here: SGLang copies the ids of every row, the re-routing included, for requests with
``return_routed_experts``. A free slot may hold -1 there, which a consumer cannot gather by.
Goes when SGLang's capture defines an id for slots without an expert.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer
from torch import Tensor

from ....engine.hooking import Hook
from ....policies import FreeSlots
from ....runtime.plan import Layer
from ...marks import LAYER


def around(original: Any, topk_config: Any, layer_id: int | None, topk_ids: Tensor) -> None:
    layer = getattr(topk_config, LAYER, None)
    if layer is not None and get_global_experts_capturer() is not None:
        topk_ids = name_free_slots(layer, topk_ids)
    original(topk_config, layer_id, topk_ids)


def name_free_slots(layer: Layer, ids: Tensor) -> Tensor:
    """Ids with which a row's free slots repeat its first expert; padded rows name expert 0.

    Args:
        ids: ``[num_rows, top_k]``, and columns of shared experts, which stay.
    """
    if layer.free_slots is FreeSlots.REPEAT_FIRST:
        return ids
    routed = ids[:, : layer.top_k]
    first = routed[:, :1].clamp(min=0)
    named = ids.clone()
    named[:, : layer.top_k] = routed.where(routed >= 0, first)
    return named


HOOK = Hook(
    target="sglang.srt.layers.moe.topk.capture_routed_experts_if_allowed",
    kind="around",
    function=around,
)
