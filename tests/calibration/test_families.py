"""Every family's artifact equals what the whole model in float64 gives, formula by formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.models import make_tiny_models
from sglang_moe_routing.artifacts import METRICS as STORED
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.calibration import metrics
from sglang_moe_routing.calibration.metrics import METRICS
from tests.calibration import direct
from tests.calibration.conftest import calibration, random_text

TOLERANCE = 1e-5
Tiny = Callable[[str], Path]


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5; of the value where it is above 1, as `routed` and `joint` may be."""
    scale = expected.double().abs().clamp_min(1)
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("metric", direct.METRICS)
@pytest.mark.parametrize("family", make_tiny_models.FAMILIES)
def test_artifacts_equal_the_direct_computation(
    tiny: Tiny, family: str, metric: str, tmp_path: Path
) -> None:
    """Within 1e-5; dense layers have no matrix, shared experts no row."""
    folder, out = tiny(family), tmp_path / "similarity.safetensors"
    text = random_text()
    calibration(folder, out, metric, text).run()
    artifact = load_artifact(out)
    expected = direct.run_whole_model(folder, text.token_ids)
    assert artifact.layers == sorted(expected) == make_tiny_models.moe_layers(folder)
    for layer in artifact.layers:
        assert_close(artifact.matrices[layer], direct.METRICS[metric](expected[layer]))
    assert bool(artifact.coefficients) == (metric in direct.COEFFICIENTS)
    for layer, found in artifact.coefficients.items():
        assert_close(found, direct.COEFFICIENTS[metric](expected[layer]))


@pytest.mark.parametrize("metric", METRICS)
def test_small_blocks_of_tokens_give_the_same(
    tiny: Tiny, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept between blocks is all that a metric needs."""
    folder = tiny("qwen3_moe")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    calibration(folder, whole, metric).run()
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 7 * 16 * 64 * 4)  # 7 tokens
    calibration(folder, cut, metric).run()
    for layer, matrix in load_artifact(whole).matrices.items():
        assert_close(load_artifact(cut).matrices[layer], matrix)
    for layer, matrix in load_artifact(whole).coefficients.items():
        assert_close(load_artifact(cut).coefficients[layer], matrix)


@pytest.mark.parametrize("metric", ["weights", "router"])
@pytest.mark.parametrize("family", make_tiny_models.FAMILIES)
def test_some_metrics_need_no_text(tiny: Tiny, family: str, metric: str, tmp_path: Path) -> None:
    """The same matrix each time; other layers' experts give another one."""
    folder, out = tiny(family), tmp_path / "similarity.safetensors"
    calibration(folder, out, metric).run()
    first = load_artifact(out)
    calibration(folder, tmp_path / "again.safetensors", metric).run()
    again = load_artifact(tmp_path / "again.safetensors")
    assert first.layers == make_tiny_models.moe_layers(folder)
    matrices = [first.matrices[layer] for layer in first.layers]
    assert all(torch.equal(first.matrices[i], again.matrices[i]) for i in first.layers)
    assert not torch.allclose(matrices[0], matrices[1])


@pytest.mark.parametrize("family", make_tiny_models.FAMILIES)
def test_router_is_the_cosine_of_the_routers_rows(tiny: Tiny, family: str, tmp_path: Path) -> None:
    folder, out = tiny(family), tmp_path / "similarity.safetensors"
    calibration(folder, out, "router").run()
    stored = load_file(folder / "model.safetensors")
    for layer, matrix in load_artifact(out).matrices.items():
        rows = next(
            tensor.double()
            for name, tensor in stored.items()
            if f".{layer}." in name and name.endswith(("gate.weight", "router.weight"))
        )
        expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
        assert_close(matrix, (expected + 1) / 2)


def test_weights_do_not_depend_on_the_order_of_neurons(tiny: Tiny, tmp_path: Path) -> None:
    """Permuting an expert's inner neurons changes nothing that it computes."""
    folder = tmp_path / "permuted"
    shutil.copytree(tiny("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.experts.3."
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for name in ("gate_proj", "up_proj"):
        tensors[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"][order].contiguous()
    tensors[f"{prefix}down_proj.weight"] = tensors[f"{prefix}down_proj.weight"][
        :, order
    ].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = []
    for source in (tiny("qwen3_moe"), folder):
        out = tmp_path / f"{source.name}.safetensors"
        calibration(source, out, "weights").run()
        found.append(load_artifact(out))
    assert_close(found[0].matrices[1], found[1].matrices[1])
    assert found[0].fingerprint != found[1].fingerprint


def test_every_metric_that_can_be_stored_can_be_computed() -> None:
    assert set(METRICS) == set(STORED)
    assert set(direct.COEFFICIENTS) == {
        m for m, stored in STORED.items() if stored.has_coefficients
    }
