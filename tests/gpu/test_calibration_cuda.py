"""Calibration on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.models import make_tiny_models
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.calibration.metrics import METRICS
from tests.calibration.conftest import calibration

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_artifacts_are_those_of_the_cpu(family: str, metric: str, tmp_path: Path) -> None:
    """Within the rounding of float32 products in another order."""
    folder = make_tiny_models.make(family, tmp_path / family)
    made = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        calibration(folder, out, metric, device=device).run()
        made[device] = load_artifact(out)
    for name in ("matrices", "coefficients"):
        expected, found = (getattr(made[device], name) for device in ("cpu", "cuda"))
        for layer, matrix in expected.items():
            torch.testing.assert_close(found[layer], matrix, rtol=0, atol=1e-4)
