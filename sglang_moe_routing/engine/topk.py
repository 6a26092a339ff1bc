"""SGLang's own choice of experts for softmax routers, for measuring ours beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.layers.moe.topk import fused_topk, fused_topk_torch_native
from torch import Tensor


def engine_topk(logits: Tensor, top_k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call of what SGLang runs on this device: ``(topk_weights, topk_ids)``, renormalised."""
    hidden_states = torch.empty(logits.shape[0], 1, device=logits.device)
    run = fused_topk if logits.is_cuda else fused_topk_torch_native
    return lambda: run(hidden_states, logits, top_k, True)
