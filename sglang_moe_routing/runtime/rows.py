"""The rows of one forward as the device sees them, and how many ran under which policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import EngineError
from ..policies import PAD
from .definitions import VANILLA_ID, Definition


class RowViews:
    """Policy ids of the rows, in static device buffers that captured graphs read.

    Every isolation group has its own view, in which rows of other groups are padding. Rows without
    a request (graph padding) are in the group of the first row, those that `write` was told of.
    """

    def __init__(self, num_groups: int, max_rows: int, device: torch.device) -> None:
        self.num_groups = num_groups
        self.num_rows = 0
        """Rows whose group is known, padded ones included."""
        self._max_rows = max_rows
        self._num_written = 0  # rows beyond are `PAD`
        self._present: Sequence[int] = range(num_groups)
        views = num_groups + (num_groups > 1)  # the last one: live rows, all as vanilla
        self._views: dict[tuple[int, int], Tensor] = {}  # every layer asks for the same ones
        self._ids = torch.full((views, max_rows), PAD, dtype=torch.int32, device=device)
        self._masks = torch.zeros((num_groups, max_rows, 1), dtype=torch.bool, device=device)

    def policy_ids(self, group: int, num_rows: int) -> Tensor:
        """int32 ``[num_rows]``, `PAD` for rows of other groups and without a request."""
        view = self._views.get((group, num_rows))
        if view is None:
            view = self._views[group, num_rows] = self._ids[group, :num_rows]
        return view

    def live(self, num_rows: int) -> Tensor:
        """int32 ``[num_rows]``: vanilla for every live row, `PAD` for the others."""
        return self._ids[-1, :num_rows]

    def of_group(self, group: int, num_rows: int) -> Tensor:
        """bool ``[num_rows, 1]``: rows whose routing the call of `group` decides."""
        return self._masks[group, :num_rows]

    def groups_to_run(self, *, is_capturing: bool) -> Sequence[int]:
        """Groups that have rows; a graph is captured for all."""
        return range(self.num_groups) if is_capturing else self._present

    def write(self, policy_ids: Sequence[int], group_ids: Sequence[int], num_rows: int = 0) -> None:
        """Take the rows of the next forward. What it costs depends on this one and the last.

        Args:
            num_rows: of the calls to come, those without a request included, at most.

        Raises:
            EngineError: they are too many.
        """
        num_live = len(policy_ids)
        num_rows = max(num_live, num_rows)
        if num_rows > self._max_rows:
            raise EngineError(f"a forward has {num_rows} rows, the policy buffer {self._max_rows}")
        live = torch.tensor([policy_ids], dtype=torch.int32)
        if self.num_groups > 1:
            live = self._split(live, torch.tensor(group_ids, dtype=torch.int32), num_rows)
        self._views.clear()
        stale = max(0, self._num_written - num_live)
        self._bring(pad(live, (0, stale), value=PAD) if stale else live, self._ids)
        self._num_written, self.num_rows = num_live, num_rows

    def _split(self, policy_ids: Tensor, group_ids: Tensor, num_rows: int) -> Tensor:
        """Views of the live rows, ``[num_groups + 1, num_live]``; sets the masks."""
        groups, num_live = torch.arange(self.num_groups)[:, None], len(group_ids)
        first = int(group_ids[0]) if num_live else 0
        masks = groups == pad(group_ids, (0, num_rows - num_live), value=first)
        self._bring(masks[..., None], self._masks)
        mine = masks[:, :num_live]
        self._present = mine.any(dim=1).nonzero().flatten().tolist() or [first]
        views = torch.where(mine, policy_ids, PAD)
        return torch.cat([views, torch.full_like(policy_ids, VANILLA_ID)])

    @staticmethod
    def _bring(host: Tensor, buffer: Tensor) -> None:
        """Copy into the head of every view of `buffer`, without waiting for it."""
        if buffer.is_cuda:
            host = host.pin_memory()  # fresh each step: the copy may outlive this call
        buffer[:, : host.shape[1]].copy_(host, non_blocking=True)


class RowCounts:
    """Decode rows by policy, and those whose policy did not act, counted on the host."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.disengaged: Counter[tuple[str, str]] = Counter()
        """By policy and reason: 'min_rows' or 'max_rows'."""

    def add(
        self, policy_ids: Sequence[int], group_ids: Sequence[int], table: Sequence[Definition]
    ) -> None:
        """Count the rows of one decode step."""
        if not any(policy_ids):  # the common one, in haste
            self.rows[table[VANILLA_ID].name] += len(policy_ids)
            return
        counts = Counter(zip(policy_ids, group_ids, strict=True))
        num_live: Counter[int] = Counter()
        for (_, group), num_rows in counts.items():
            num_live[group] += num_rows
        for (policy_id, group), num_rows in counts.items():
            name, engage = table[policy_id].name, table[policy_id].policy.engage
            self.rows[name] += num_rows
            if policy_id == VANILLA_ID:
                continue
            if num_live[group] < engage.min_rows:
                self.disengaged[name, "min_rows"] += num_rows
            elif engage.max_rows is not None and num_live[group] > engage.max_rows:
                self.disengaged[name, "max_rows"] += num_rows

    def read(self) -> dict[str, dict[str, int]]:
        """Rows by policy, and those in which it did not act, by reason."""
        return {
            name: {"rows": self.rows[name]}
            | {r: self.disengaged[name, r] for r in ("min_rows", "max_rows")}
            for name in sorted(self.rows)
        }
