"""Artifacts that `calibrate` makes, several of them in one server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import SimilarityArtifact, load_artifact, save_artifact
from sglang_moe_routing.checkpoint import Fingerprint
from tests.recorded import check_recorded

from .test_routing import generate_all

CONFIG = """
version: 1
similarity:
  routed: routed.safetensors
  foreign: {path: foreign.safetensors, allow_other_weights: true}
policies:
  routed-s1: {kind: sere, num_primary: 1, threshold: -1000, similarity: routed}
  routed-s2: {kind: sere, num_primary: 2, threshold: 0, similarity: routed}
  foreign-s2: {kind: sere, num_primary: 2, threshold: 0.4, similarity: foreign}
"""


def calibrate(out: Path, *options: str) -> dict[str, Any]:
    """Run the command; what it prints with --json."""
    command = (
        "-m",
        "sglang_moe_routing",
        "calibrate",
        str(demo.MODEL),
        "--out",
        str(out),
        "--json",
    )
    done = subprocess.run(
        [sys.executable, *command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, an artifact of the demo model, and one that claims to be of another model."""
    folder = tmp_path_factory.mktemp("calibrated")
    text = ("--data", str(demo.MODEL.parent / "heldout.txt"), "--num-sequences", "64")
    summary = calibrate(folder / "routed.safetensors", "--metric", "routed", *text)
    assert summary["details"]["text"]["tokens"] == 64 * 128
    calibrate(folder / "weights.safetensors", "--metric", "weights")
    mine = load_artifact(folder / "weights.safetensors")
    foreign = replace(mine, fingerprint=Fingerprint("another", "checkpoint"))
    save_artifact(foreign, folder / "foreign.safetensors")
    (folder / "routing.yaml").write_text(CONFIG)
    return folder


def test_policies_of_one_server_use_different_artifacts(
    folder: Path, start: Callable[..., Any]
) -> None:
    """Each row follows its own policy's matrix, asymmetric ones included."""

    def matrices(name: str) -> dict[int, np.ndarray]:
        artifact: SimilarityArtifact = load_artifact(folder / f"{name}.safetensors")
        return {layer: matrix.numpy() for layer, matrix in artifact.matrices.items()}

    routed, foreign = matrices("routed"), matrices("foreign")
    rules: dict[str, dict[str, Any]] = {
        "vanilla": {},
        "routed-s1": {"k0": 1, "threshold": -1000, "similarity": routed},
        "routed-s2": {"k0": 2, "threshold": 0, "similarity": routed},
        "foreign-s2": {"k0": 2, "threshold": 0.4, "similarity": foreign},
    }
    with start(folder / "routing.yaml") as running:
        calls = running.record(lambda: generate_all(running.url, [*rules] * 4))
        log = running.server.log.read_text()
    assert any(len(set(call["rows"])) == len(rules) for call in calls)
    check_recorded(calls, rules)
    assert "allowed by similarity.foreign.allow_other_weights" in log
    assert "tensors of other names, dtypes or shapes" in log
