"""Counts of active experts, kept on the device and read out on request only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..policies import PAD, Rerouted, num_distinct

KEY = "moe_routing"
"""Where the counts stand in SGLang's internal state."""

COLUMNS = ("calls", "rows", "active_experts", "active_experts_base")


class Statistics:
    """Sums over decode steps, per MoE layer.

    Counting adds to a device tensor and never synchronises; it works inside captured graphs.
    """

    def __init__(self, layer_ids: Sequence[int], device: torch.device) -> None:
        self._layer_ids = layer_ids
        self._sums = torch.zeros(len(layer_ids), len(COLUMNS), dtype=torch.int64, device=device)

    def count(self, index: int, policy_ids: Tensor, outcome: Rerouted) -> None:
        """Count one MoE call of layer number `index`; a call without live rows counts nothing."""
        num_live = (policy_ids != PAD).sum()
        self._add(index, num_live, outcome.active, outcome.active_base)

    def count_vanilla(self, index: int, topk_ids: Tensor, num_experts: int) -> None:
        """Count one MoE call that nobody re-routes and that has no padded rows."""
        active = num_distinct(topk_ids, num_experts)
        self._add(index, torch.full_like(active, topk_ids.shape[0]), active, active)

    def _add(self, index: int, num_rows: Tensor, active: Tensor, active_base: Tensor) -> None:
        called = (num_rows > 0).long()
        self._sums[index] += torch.stack([called, num_rows, active, active_base])

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._sums.zero_()

    def read(self) -> list[dict[str, Any]]:
        """Sums per layer. Synchronises the device."""
        return [
            {"layer": layer, **dict(zip(COLUMNS, row, strict=True))}
            for layer, row in zip(self._layer_ids, self._sums.tolist(), strict=True)
        ]
