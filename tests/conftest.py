"""Layers: every folder of tests is a marker, and its tests know with which others they run."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LAYERS = ("e2e", "kernels", "calibration", "integration", "unit", "gpu")
"""In the order in which a run of all works on them: what takes long comes first."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(layer_of(item))
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(TESTS))))
    items.sort(key=lambda item: LAYERS.index(layer_of(item)))


def layer_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]
