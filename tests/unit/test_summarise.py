"""Summaries of measurements, as committed in docs/bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.studies import summarise

FIGURES = {
    "cross_entropy": 3.123456,
    "ci95": [0.1, 0.2],
    "sequence_losses": [1.0] * 99,
    "tokens": 9,
}
MEASURED = {
    "command": "sglang-moe-routing evaluate model",
    "settings": {"seed": 0},
    "machine": {"processor": "P", "accelerator": None, "system": "Linux of one machine"},
    "model": "model",
    "policies": {f"budget-{n}": {"16": FIGURES | {"delta": n}} for n in range(8)},
}


def summary(tmp_path: Path, **options: str) -> list[str]:
    measured, out = tmp_path / "evaluate.json", tmp_path / "summary.json"
    measured.write_text(json.dumps(MEASURED))
    keys = dict.fromkeys(("command", "config", "commit", "date"), "") | options
    summarise.main("evaluate", measured, out, **keys)
    return out.read_text().splitlines()


def test_a_summary_says_how_it_was_made(tmp_path: Path) -> None:
    made = json.loads("".join(summary(tmp_path, config="a.yaml", commit="abc", date="2026-01-02")))
    assert {name: made[name] for name in summarise.HEAD} == {
        "command": "sglang-moe-routing evaluate model",
        "config": {"seed": 0, "routing_config": "a.yaml"},
        "commit": "abc",
        "date": "2026-01-02",
        "machine": {"processor": "P"},
    }


def test_a_row_is_a_line_of_figures_without_single_losses(tmp_path: Path) -> None:
    columns = '"section", "policy", "batch", "tokens", "cross_entropy", "delta", "ci95"'
    lines = summary(tmp_path)
    assert f' "columns": [{columns}],' in lines
    assert '  ["policies", "budget-1", 16, 9, 3.1235, 1, [0.1, 0.2]],' in lines


def test_lines_stay_short_and_hold_everything() -> None:
    value = {"words": ["word"] * 99, "figures": {f"n{n}": [n, n] for n in range(99)}, "rows": []}
    text = summarise.lay_out(value)
    assert json.loads(text) == value
    assert max(map(len, text.splitlines())) <= summarise.WIDTH
    assert len(text.splitlines()) < 25


def test_a_long_summary_is_refused(tmp_path: Path) -> None:
    rows = [["a row of its own"] for _ in range(99)]
    with pytest.raises(ValueError, match=r"long\.json: a summary has at most 60 lines, this has"):
        summarise.write({"rows": rows}, tmp_path / "long.json")
