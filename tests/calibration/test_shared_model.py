"""The trained model of 31.7 M parameters beside the project: exactness, and what SERE costs there.

Only where the folder `shared/models` lies beside the checkout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.calibration.data import CalibrationText
from tests.calibration import direct
from tests.calibration.conftest import calibration

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not there")

DELTA_TOLERANCE = 0.01
ACTIVE_TOLERANCE = 0.3


@pytest.fixture(scope="module")
def text() -> CalibrationText:
    """The tokens that the recorded matrices were made from."""
    tokens = np.load(MODELS / "oracle_sim_A.npz")["tokens"]
    return CalibrationText(torch.from_numpy(tokens), ("calib_A.txt",), 0)


@pytest.fixture(scope="module")
def artifact(text: CalibrationText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "frobenius.safetensors"
    calibration(MODELS / "A", out, "frobenius", text).run()
    return out


def test_frobenius_is_what_was_recorded(artifact: Path) -> None:
    """The matrices behind the recorded table of quality, made by another program."""
    recorded = np.load(MODELS / "oracle_sim_A.npz")["sim"]
    for layer, matrix in load_artifact(artifact).matrices.items():
        expected = torch.from_numpy(recorded[layer])
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("metric", ["frobenius", "routed"])
def test_artifacts_equal_the_direct_computation(
    text: CalibrationText, tmp_path: Path, metric: str
) -> None:
    """In float64 with the whole model in memory, on 384 tokens."""
    few = CalibrationText(text.token_ids[:3], text.sources, 0)
    out = tmp_path / "similarity.safetensors"
    calibration(MODELS / "A", out, metric, few).run()
    expected = direct.run_whole_model(MODELS / "A", few.token_ids)
    for layer, matrix in load_artifact(out).matrices.items():
        found = direct.METRICS[metric](expected[layer])
        torch.testing.assert_close(matrix.double(), found, rtol=0, atol=1e-5)
