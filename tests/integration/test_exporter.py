"""How counts become metrics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from sglang_moe_routing.integration import metrics


def test_a_count_that_begins_anew_goes_on_adding() -> None:
    """As after graphs are captured again; a Prometheus counter cannot fall."""
    runtime = SimpleNamespace(config=SimpleNamespace(metrics=SimpleNamespace(per_layer=False)))
    exporter = metrics.Exporter(runtime, torch.device("cpu"))
    counter = metrics._make(metrics._CALLS)
    start = counter._value.get()
    for total in (10, 12, 3, 4):
        exporter._add(metrics._CALLS, (), total)
    assert counter._value.get() - start == 12 + 4
