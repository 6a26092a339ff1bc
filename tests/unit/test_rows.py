"""Rows of a forward as the device sees them, and their counts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.policies import PAD
from sglang_moe_routing.runtime.definitions import Definition, define
from sglang_moe_routing.runtime.rows import RowCounts, RowViews

CPU = torch.device("cpu")


def test_one_group_sees_all_rows() -> None:
    views = RowViews(1, 8, CPU)
    views.write([2, 0, 1], [0, 0, 0])
    assert views.policy_ids(0, 5).tolist() == [2, 0, 1, -1, -1]
    views.write([3], [0])
    assert views.policy_ids(0, 3).tolist() == [3, -1, -1]


def test_groups_see_their_own_rows() -> None:
    views = RowViews(3, 8, CPU)
    views.write([2, 0, 1, 4], [2, 0, 2, 0])
    assert views.policy_ids(0, 6).tolist() == [-1, 0, -1, 4, -1, -1]
    assert views.policy_ids(1, 6).tolist() == [-1] * 6
    assert views.policy_ids(2, 6).tolist() == [2, -1, 1, -1, -1, -1]
    assert views.live(6).tolist() == [0, 0, 0, 0, -1, -1]
    assert list(views.groups_to_run(is_capturing=False)) == [0, 2]
    assert list(views.groups_to_run(is_capturing=True)) == [0, 1, 2]


def test_every_row_is_decided_by_one_group() -> None:
    views = RowViews(3, 8, CPU)
    views.write([2, 0, 1, 4], [2, 0, 2, 0], num_rows=8)
    masks = torch.cat([views.of_group(group, 8) for group in range(3)], dim=1)
    assert (masks.sum(dim=1) == 1).all()
    assert masks[:4].int().argmax(dim=1).tolist() == [2, 0, 2, 0]
    assert masks[4:].int().argmax(dim=1).tolist() == [2] * 4  # padding goes with the first row


def some_rows(num_groups: int) -> tuple[list[int], list[int], int]:
    """Policy and group ids of a batch, and the rows of a call with it, padded ones included."""
    num_live = random.randint(0, 40)
    policies = [random.randint(0, 5) for _ in range(num_live)]
    groups = [random.randrange(num_groups) for _ in range(num_live)]
    return policies, groups, num_live + random.choice([0, 0, 1, 24])


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_a_batch_leaves_nothing_for_the_next(num_groups: int) -> None:
    """Whatever ran before: the rows that a call can see are those of new buffers."""
    random.seed(num_groups)
    used = RowViews(num_groups, 64, CPU)
    for _ in range(200):
        policies, groups, num_rows = some_rows(num_groups)
        used.write(policies, groups, num_rows)
        new = RowViews(num_groups, 64, CPU)
        new.write(policies, groups, num_rows)
        for group in range(num_groups):
            assert torch.equal(used.policy_ids(group, 64), new.policy_ids(group, 64))
            assert used.policy_ids(group, 64)[len(policies) :].eq(PAD).all()
            assert torch.equal(used.of_group(group, num_rows), new.of_group(group, num_rows))
        assert torch.equal(used.live(64), new.live(64))
        present = used.groups_to_run(is_capturing=False)
        assert set(present) == set(groups or [0])


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_step_touches_the_rows_of_its_batch_and_of_the_last_one_only(num_groups: int) -> None:
    """However long the context, which the buffers are made for."""
    max_rows = 1 << 18
    views = RowViews(num_groups, max_rows, CPU)
    views.write([1] * 40, [0] * 40)
    with Touched() as touched:
        views.write([1] * 8, [0] * 8)
    assert touched.most <= (num_groups + 1) * 40


class Touched(TorchDispatchMode):
    """Elements that the largest result of an operator has, views of whole buffers left out."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.most = max(self.most, result.numel())
        return result


def test_buffers_stay_where_they_are() -> None:
    views = RowViews(2, 8, CPU)
    before = [t.data_ptr() for t in (views.policy_ids(1, 2), views.live(2), views.of_group(1, 2))]
    views.write([1, 2], [1, 0])
    after = [t.data_ptr() for t in (views.policy_ids(1, 2), views.live(2), views.of_group(1, 2))]
    assert before == after


@pytest.mark.parametrize("num_groups", [1, 2])
def test_too_many_rows(num_groups: int) -> None:
    with pytest.raises(EngineError, match="9 rows, the policy buffer 8"):
        RowViews(num_groups, 8, CPU).write([0] * 9, [0] * 9)


@pytest.fixture
def table(tmp_path: Path) -> tuple[Definition, ...]:
    path = tmp_path / "routing.yaml"
    path.write_text(
        "version: 1\n"
        "policies:\n"
        "  a: {kind: oea, k0: 3, engage: {min_rows: 3, max_rows: 4}}\n"
        "  b: {kind: oea, k0: 3}\n"
    )
    return define(load_config(path), {})


def test_rows_are_counted_by_policy(table: tuple[Definition, ...]) -> None:
    counts = RowCounts()
    counts.add([0, 1, 1, 2], [0] * 4, table)
    assert counts.read() == {
        "a": {"rows": 2, "min_rows": 0, "max_rows": 0},
        "b": {"rows": 1, "min_rows": 0, "max_rows": 0},
        "vanilla": {"rows": 1, "min_rows": 0, "max_rows": 0},
    }


def test_rows_whose_policy_does_not_act(table: tuple[Definition, ...]) -> None:
    counts = RowCounts()
    counts.add([1, 2], [0] * 2, table)
    counts.add([1, 1, 1, 0, 0], [0] * 5, table)
    assert counts.read()["a"] == {"rows": 4, "min_rows": 1, "max_rows": 3}


def test_live_rows_are_those_of_the_group(table: tuple[Definition, ...]) -> None:
    counts = RowCounts()
    counts.add([1, 1, 1, 2, 2], [0, 0, 1, 1, 1], table)
    assert counts.read()["a"] == {"rows": 3, "min_rows": 2, "max_rows": 0}
