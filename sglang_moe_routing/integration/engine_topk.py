"""SGLang's own choice of experts for softmax routers, for measuring ours beside it."""

from __future__ import annotations

import torch
from sglang.srt.layers.moe.topk import fused_topk, fused_topk_torch_native
from torch import Tensor


def engine_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What SGLang runs on this device: ``(topk_weights, topk_ids)``, renormalised."""
    hidden_states = torch.empty(logits.shape[0], 1, device=logits.device)
    run = fused_topk if logits.is_cuda else fused_topk_torch_native
    weights, ids = run(hidden_states, logits, top_k, True)
    return weights, ids
