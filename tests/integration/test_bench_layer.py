"""`bench layer` with real worker processes on the smallest shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moe_routing.cli import app
from sglang_moe_routing.cpu import bench_layer as layer

pytest.importorskip("sglang")


def test_ours_and_the_engines_are_measured_and_agree(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ["bench", "layer", "--shapes", "demo", "--impls", "ours,native,torch"]
    command += ["--active-experts", "8,64", "--rounds", "3", "--threads", "1"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "layer.json").read_text())
    assert (tmp_path / "layer.png").exists()
    assert found["stream_gb_s"] > 0
    assert list(found["fit"]["demo"]) == ["ours", "native", "torch"]
    assert {(case["impl"], case["active_experts"]) for case in found["cases"]} == {
        (impl, count) for impl in layer.OWN for count in (8, 64)
    }
    assert all(case["median_ms"] > 0 for case in found["cases"])
    errors = found["relative_error"]["demo"]
    assert all(0 < error < layer.TOLERANCE for error in errors.values())


def test_a_wrong_result_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "TOLERANCE", 1e-9)
    command = ["bench", "layer", "--shapes", "demo", "--impls", "ours", "--rounds", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "ours is wrong at demo, T = 64: off by" in result.stderr
