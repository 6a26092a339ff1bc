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


_PARTS = ("groups", "before", "after")
_PART_OF_COLUMN = ("before", "before", "after", "before", "groups", "groups")


class Statistics:
    """Sums over decode steps, per MoE layer.

    Counting adds to a device tensor and never synchronises; it works inside captured graphs.

    With several isolation groups a layer makes one call per group, but active experts are those of
    all rows together. So its sums come in three parts: of the groups' calls, and of a count of all
    rows before and after them.
    """

    def __init__(self, layer_ids: Sequence[int], device: torch.device, num_groups: int = 1) -> None:
        self._layer_ids = layer_ids
        self._parts = _PARTS if num_groups > 1 else _PARTS[:1]
        shape = (len(layer_ids), len(self._parts), len(COLUMNS))
        self._sums = torch.zeros(shape, dtype=torch.int64, device=device)

    def of_layer(self, index: int, part: str = "groups") -> Tensor:
        """The counts of layer number `index`, int64 ``[6]``, to add to."""
        return self._sums[index, self._parts.index(part)]

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
            for layer, row in zip(self._layer_ids, self.totals().tolist(), strict=True)
        ]

    def totals(self) -> Tensor:
        """int64 ``[num_layers, 6]`` on the CPU. Synchronises the current stream."""
        sums = self._sums.cpu()
        if len(self._parts) == 1:
            return sums[:, 0]
        parts = [self._parts.index(part) for part in _PART_OF_COLUMN]
        return sums[:, parts, range(len(COLUMNS))]


def count(sums: Tensor, policy_ids: Tensor, outcome: Rerouted) -> None:
    """Add one MoE call to int64 ``[6]``; a call without live rows counts nothing."""
    num_live = (policy_ids != PAD).sum()
    counts = (
        (num_live > 0).long(),
        num_live,
        outcome.active,
        outcome.active_base,
        outcome.moved_slots,
        outcome.critical,
    )
    sums += torch.stack(counts)
