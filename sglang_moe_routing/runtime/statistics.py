"""Counts of active experts, kept on the device and read out on request only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..policies import PAD, Rerouted
from .rows import RowCounts

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


_DEFERRED_STEPS = 64
GROUPS, BEFORE, AFTER = _PARTS = range(3)
"""Parts of a layer's sums: what the groups' calls count, and all rows before and after them."""

_PART_OF_COLUMN = (BEFORE, BEFORE, AFTER, BEFORE, GROUPS, GROUPS)


class Statistics:
    """Sums over decode steps, per MoE layer.

    Counting adds to a device tensor and never synchronises; it works inside captured graphs.

    With several isolation groups a layer makes one call per group, but active experts are those of
    all rows together. So its sums come in three parts.

    On a CPU, steps that nobody re-routes are counted apart and many at a time: call by call would
    take longer there than the policies themselves.

    Args:
        layers: layer id and top-k of each.
        num_experts: at most, of any layer.

    Attributes:
        rows: decode rows by policy, counted on the host.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]],
        device: torch.device,
        num_experts: int,
        num_groups: int = 1,
    ) -> None:
        self.rows = RowCounts()
        self._layer_ids, self._top_k = zip(*layers, strict=True)
        self._num_experts = num_experts
        self.defers = device.type == "cpu"
        self._vanilla = torch.zeros(len(layers), 3, dtype=torch.int64, device=device)
        self._pending: deque[Sequence[tuple[int, Tensor]]] = deque()
        self._settling = threading.Lock()  # the metrics thread reads, too
        self._parts = _PARTS if num_groups > 1 else _PARTS[:1]
        shape = (len(layers), len(self._parts), len(COLUMNS))
        self._sums = torch.zeros(shape, dtype=torch.int64, device=device)

    def of_layer(self, index: int) -> Tensor:
        """The counts of layer number `index`, int64 ``[parts, 6]``, to add to."""
        return self._sums[index]

    def count_vanilla(self, calls: Sequence[tuple[int, Tensor]]) -> None:
        """Count the MoE calls of a step that nobody re-routes and that has no padded rows.

        Args:
            calls: number of the layer and top-k ids, shared experts behind the routed ones. They
                must stay as they are; on a CPU nothing of SGLang's writes to them later.
        """
        self._pending.append(calls)
        if len(self._pending) >= _DEFERRED_STEPS:
            self._settle()

    def _settle(self) -> None:
        """Count the steps that wait for it."""
        with self._settling:
            steps = [self._pending.popleft() for _ in range(len(self._pending))]
            calls = [call for step in steps for call in step]
            if not calls:
                return
            layers = [index for index, _ in calls]
            ids = [ids[:, : self._top_k[index]] for index, ids in calls]
            sizes = torch.tensor([i.numel() for i in ids])
            call = torch.arange(len(ids)).repeat_interleave(sizes)
            used = torch.zeros(len(ids), self._num_experts + 1, dtype=torch.bool)  # the last: id -1
            used[call, torch.cat([i.flatten() for i in ids])] = True
            num_rows = torch.tensor([len(i) for i in ids])
            counts = torch.stack(
                [torch.ones_like(num_rows), num_rows, used[:, :-1].sum(dim=1)], dim=1
            )
            self._vanilla.index_add_(0, torch.tensor(layers), counts)

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Forget the calls that are made meanwhile, as those are with which graphs are captured."""
        counted = self._sums.clone()
        try:
            yield
        finally:
            self._sums.copy_(counted)

    def read(self) -> list[dict[str, Any]]:
        """Sums per layer. Synchronises the device."""
        return [
            {"layer": layer, **dict(zip(COLUMNS, row, strict=True))}
            for layer, row in zip(self._layer_ids, self.totals().tolist(), strict=True)
        ]

    def totals(self) -> Tensor:
        """int64 ``[num_layers, 6]`` on the CPU. Synchronises the current stream."""
        self._settle()
        sums = self._sums.cpu()
        parts = [part if part in self._parts else GROUPS for part in _PART_OF_COLUMN]
        totals = sums[:, parts, range(len(COLUMNS))]
        calls, rows, active = self._vanilla.cpu().unbind(dim=1)
        nothing = torch.zeros_like(calls)
        return totals + torch.stack([calls, rows, active, active, nothing, nothing], dim=1)


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
