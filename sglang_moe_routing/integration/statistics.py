"""Counts of active experts, kept on the device and read out on request only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..policies import PAD, Rerouted, num_distinct

KEY = "moe_routing"
"""Where the counts stand in SGLang's internal state."""

COLUMNS = (
    "calls",
    "rows",
    "active_experts",
    "active_experts_base",
    "moved_slots",
    "critical_experts",
)
"""Counts of one layer, in the order in which the kernels add to them."""


class Statistics:
    """Sums over decode steps, per MoE layer.

    Counting adds to a device tensor and never synchronises; it works inside captured graphs.
    """

    def __init__(self, layer_ids: Sequence[int], device: torch.device) -> None:
        self._layer_ids = layer_ids
        self._sums = torch.zeros(len(layer_ids), len(COLUMNS), dtype=torch.int64, device=device)

    def of_layer(self, index: int) -> Tensor:
        """The counts of layer number `index`, int64 ``[6]``: for kernels to add to."""
        return self._sums[index]

    def count(self, index: int, policy_ids: Tensor, outcome: Rerouted) -> None:
        """Count one MoE call of layer number `index`; a call without live rows counts nothing."""
        num_live = (policy_ids != PAD).sum()
        counts = (
            (num_live > 0).long(),
            num_live,
            outcome.active,
            outcome.active_base,
            outcome.moved_slots,
            outcome.critical,
        )
        self._sums[index] += torch.stack(counts)

    def count_vanilla(self, index: int, topk_ids: Tensor, num_experts: int) -> None:
        """Count one MoE call that nobody re-routes and that has no padded rows, without kernels."""
        active = num_distinct(topk_ids, num_experts)
        num_rows = torch.full_like(active, topk_ids.shape[0])
        nothing = torch.zeros_like(active)
        counts = (num_rows.clamp(max=1), num_rows, active, active, nothing, nothing)
        self._sums[index] += torch.stack(counts)

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._sums.zero_()

    def read(self) -> list[dict[str, Any]]:
        """Sums per layer. Synchronises the device."""
        return [
            {"layer": layer, **dict(zip(COLUMNS, row, strict=True))}
            for layer, row in zip(self._layer_ids, self._sums.tolist(), strict=True)
        ]
