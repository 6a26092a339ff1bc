"""Rows of a forward as the device sees them, and their counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration.definitions import Definition, define
from sglang_moe_routing.integration.rows import RowCounts, RowViews

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
    views.write([2, 0, 1, 4], [2, 0, 2, 0])
    masks = torch.cat([views.of_group(group, 8) for group in range(3)], dim=1)
    assert (masks.sum(dim=1) == 1).all()
    assert masks[:4].int().argmax(dim=1).tolist() == [2, 0, 2, 0]
    assert masks[4:].int().argmax(dim=1).tolist() == [2] * 4  # padding goes with the first row


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
