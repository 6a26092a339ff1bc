"""Layers: every folder of tests is a marker, and what takes long comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LAYERS = ("e2e", "kernels", "calibration", "integration", "unit", "gpu")
"""In the order in which a run of all works on them, so that two processes end together."""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(layer_of(item))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LAYERS.index(layer_of(item)))


def layer_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]
