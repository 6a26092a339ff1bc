"""Models whose experts are a list of modules, and whose combine weights no module hands over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.errors import CalibrationError
from tests.calibration import direct
from tests.calibration.conftest import calibration, random_text
from tests.calibration.list_model import ListConfig, ListModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    ListModel(ListConfig()).save_pretrained(tmp_path / "list")
    return tmp_path / "list"


def whole_model(folder: Path, token_ids: torch.Tensor) -> dict[int, direct.Layer]:
    model = ListModel.from_pretrained(folder, dtype=torch.float64).eval()
    layers: dict[int, direct.Layer] = {}

    def observe(block: torch.nn.Module, args: tuple[torch.Tensor], layer: int) -> None:
        flat = args[0].flatten(0, 1)
        probabilities = block.gate(flat).softmax(dim=1)
        kept = probabilities >= probabilities.topk(2, dim=1).values[:, 1:]
        outputs = torch.stack([expert(flat) for expert in block.experts])
        layers[layer] = direct.Layer(outputs, probabilities * kept)

    for i, layer in enumerate(model.layers):
        layer.mlp.register_forward_pre_hook(lambda block, args, i=i: observe(block, args, i))
    with torch.no_grad():
        model(input_ids=token_ids)
    return layers


@pytest.mark.parametrize("metric", direct.METRICS)
def test_artifacts_equal_the_direct_computation(folder: Path, metric: str) -> None:
    """Shared experts are left out; combine weights are found by probing."""
    out, text = folder.parent / "similarity.safetensors", random_text()
    calibration(folder, out, metric, text).run()
    artifact, expected = load_artifact(out), whole_model(folder, text.token_ids)
    assert artifact.layers == [0, 1]
    for layer in artifact.layers:
        matrix = direct.METRICS[metric](expected[layer])
        torch.testing.assert_close(artifact.matrices[layer].double(), matrix, rtol=0, atol=1e-5)
    for layer, found in artifact.coefficients.items():
        matrix = direct.COEFFICIENTS[metric](expected[layer])
        torch.testing.assert_close(found.double(), matrix, rtol=0, atol=1e-5)


def test_more_experts_than_hidden_values_cannot_be_probed(tmp_path: Path) -> None:
    ListModel(ListConfig(hidden_size=16, num_experts=20)).save_pretrained(tmp_path / "list")
    with pytest.raises(CalibrationError, match="20 experts in a list, but a hidden size of 16"):
        calibration(tmp_path / "list", tmp_path / "similarity.safetensors").run()
