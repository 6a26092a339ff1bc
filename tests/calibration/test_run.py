"""Runs: interruptions, memory, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.calibration.metrics import METRICS
from sglang_moe_routing.calibration.streaming import StreamedModel
from sglang_moe_routing.checkpoint import fingerprint, read_headers
from sglang_moe_routing.errors import CalibrationError, CheckpointError
from tests.calibration.conftest import calibration, random_text

Tiny = Callable[[str], Path]


class InterruptedRunError(Exception):
    pass


def interrupt_in(layer: int) -> Callable[[int, int, int], None]:
    """A report that ends the run in the middle of a layer, after its first batch."""

    def report(current: int, done: int, total: int) -> None:
        if current == layer and done == 1:
            raise InterruptedRunError

    return report


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "similarity.safetensors"


@pytest.mark.parametrize("metric", ["routed", "least_squares", "weights"])
def test_an_interrupted_run_goes_on_where_it_was(tiny: Tiny, out: Path, metric: str) -> None:
    """Finished layers are not run again, and the artifact is that of a run without a break."""
    folder = tiny("deepseek_v3")
    whole = out.with_name("whole.safetensors")
    calibration(folder, whole, metric).run()
    with pytest.raises(InterruptedRunError):
        calibration(folder, out, metric).run(interrupt_in(2))
    assert not out.exists()
    second = calibration(folder, out, metric)
    seen: list[int] = []
    second.run(lambda layer, done, total: seen.append(layer))
    assert second.resumed == [1]
    assert list(second.timings) == [2]
    for layer, matrix in load_artifact(whole).matrices.items():
        assert torch.equal(load_artifact(out).matrices[layer], matrix)
    for layer, matrix in load_artifact(whole).coefficients.items():
        assert torch.equal(load_artifact(out).coefficients[layer], matrix)
    assert not out.with_name(f"{out.name}.partial").exists()


def test_a_run_of_other_settings_does_not_go_on(tiny: Tiny, out: Path) -> None:
    """It names what differs; --restart starts over."""
    with pytest.raises(InterruptedRunError):
        calibration(tiny("qwen3_moe"), out, "cosine").run(interrupt_in(1))
    other = calibration(tiny("qwen3_moe"), out, "routed", random_text(seed=1))
    with pytest.raises(CalibrationError, match=r"another metric, text; .* --restart"):
        other.run()
    other.run(restart=True)
    assert load_artifact(out).metric == "routed"


def test_a_folder_of_somebody_else_is_kept(tiny: Tiny, out: Path) -> None:
    """Whatever lies under the name of the partial results, also with --restart."""
    folder = out.with_name(f"{out.name}.partial")
    folder.mkdir()
    (folder / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(CalibrationError, match="holds no interrupted run; move it"):
            calibration(tiny("qwen3_moe"), out).run(restart=restart)
    assert (folder / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["run.json", "hidden-0.safetensors", "layer-0.safetensors"])
def test_a_damaged_state_is_named(tiny: Tiny, out: Path, name: str) -> None:
    with pytest.raises(InterruptedRunError):
        calibration(tiny("qwen3_moe"), out).run(interrupt_in(1))
    state = out.with_name(f"{out.name}.partial") / name
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CalibrationError, match=r"partial: damaged, add --restart"):
        calibration(tiny("qwen3_moe"), out).run()
    assert not out.exists()


def test_chosen_layers_alone_are_made(tiny: Tiny, out: Path) -> None:
    """With what they would be among all; layers behind the last one are not run."""
    whole = out.with_name("whole.safetensors")
    calibration(tiny("olmoe"), whole, "routed").run()
    run = calibration(tiny("olmoe"), out, "routed", layers=[1])
    run.run()
    assert list(run.timings) == [0, 1]
    artifact = load_artifact(out)
    assert artifact.layers == [1]
    assert torch.equal(artifact.matrices[1], load_artifact(whole).matrices[1])
    with pytest.raises(CalibrationError, match="layer 0 of deepseek_v3 has no routed experts"):
        calibration(tiny("deepseek_v3"), out, layers=[0, 1])


def test_one_layer_at_a_time_has_memory(tiny: Tiny, out: Path) -> None:
    """Every other layer's parameters lie on the meta device, also after the run."""
    run = calibration(tiny("mixtral"), out)
    layers = run.model._layers

    def resident() -> list[int]:
        return [
            i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())
        ]

    seen = []
    run.run(lambda layer, done, total: seen.append((layer, resident())))
    assert seen
    assert all(resident == [layer] for layer, resident in seen)
    assert resident() == []


def test_the_artifact_says_where_it_comes_from(tiny: Tiny, out: Path) -> None:
    text = random_text(7, 16, seed=5)
    calibration(tiny("gpt_oss"), out, "routed", text, dtype=torch.float16).run()
    artifact = load_artifact(out)
    assert artifact.model == "gpt_oss"
    assert artifact.fingerprint == fingerprint(read_headers(tiny("gpt_oss")))
    assert {matrix.dtype for matrix in artifact.matrices.values()} == {torch.float16}
    details = artifact.details
    assert details["architecture"] == "GptOssForCausalLM"
    assert details["text"] == {
        "sources": ["random"],
        "sequences": 7,
        "sequence_length": 16,
        "tokens": 112,
        "seed": 5,
        "sha256": text.sha256,
    }
    assert set(details["versions"]) == {"sglang-moe-routing", "torch", "transformers"}


@pytest.mark.parametrize("metric", ["routed", "least_squares"])
def test_experts_without_a_token_are_named_and_measured_on_all_tokens(
    tiny: Tiny, out: Path, metric: str
) -> None:
    """A handful of tokens cannot reach 16 experts with 4 each."""
    calibration(tiny("qwen2_moe"), out, metric, random_text(1, 2)).run()
    artifact = load_artifact(out)
    for layer in artifact.layers:
        unused = artifact.details["layers"][str(layer)]["experts_without_tokens"]
        assert 16 - 2 * 4 <= len(unused) < 16
        assert bool(torch.isfinite(artifact.matrices[layer]).all())


# --- bad input -----------------------------------------------------------------------------------


def copied(source: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("metric", "name", "reported"),
    [
        *(
            (metric, "mlp.experts.5.down_proj.weight", "model.layers.1.mlp.experts.down_proj")
            for metric in METRICS
            if metric != "router"
        ),
        ("router", "mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("cosine", "self_attn.q_proj.weight", "not a parameter, but what it is given"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(
    tiny: Tiny, tmp_path: Path, out: Path, metric: str, name: str, reported: str, value: float
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.1.{name}"][3, 4] = value

    folder = changed(tiny("qwen3_moe"), tmp_path / "damaged", damage)
    message = f"layer 1 has no similarity: {re.escape(reported)} has NaN or infinite values"
    with pytest.raises(CalibrationError, match=message):
        calibration(folder, out, metric).run()
    assert not out.exists()


def test_a_missing_weight_is_named(tiny: Tiny, tmp_path: Path, out: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.self_attn.q_proj.weight"]

    folder = changed(tiny("qwen3_moe"), tmp_path / "missing", remove)
    with pytest.raises(
        CalibrationError, match=r"no weights for model\.layers\.2\.self_attn\.q_proj"
    ):
        calibration(folder, out).run()


def test_a_wrong_number_of_experts_is_named(tiny: Tiny, tmp_path: Path, out: Path) -> None:
    folder = copied(tiny("qwen3_moe"), tmp_path / "wrong", num_local_experts=12)
    with pytest.raises(CalibrationError, match=r"has shape .*16, .* config\.json says .*12, "):
        calibration(folder, out).run()


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"Qwen3ForCausalLM: no MoE layer .* a dense model"):
        StreamedModel(str(tmp_path))


def test_experts_of_unknown_structure_are_listed(tmp_path: Path) -> None:
    """Llama 4 multiplies the router's weight in before its experts, all experts in one product."""
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, intermediate_size_mlp=16,
        num_hidden_layers=1, head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, moe_layers=[0],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"feed_forward\.experts: Llama4TextExperts\("):
        StreamedModel(str(tmp_path))


def test_quantised_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(
        tiny("qwen3_moe"), tmp_path / "fp8", quantization_config={"quant_method": "fp8"}
    )
    with pytest.raises(CalibrationError, match=r"quantised weights \(fp8\)"):
        StreamedModel(str(folder))


def test_an_unknown_model_type_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("qwen3_moe"), tmp_path / "other", model_type="no_such_model")
    with pytest.raises(CalibrationError, match="no_such_model"):
        StreamedModel(str(folder))


def test_experts_that_do_not_add_up_are_refused(
    tiny: Tiny, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights mean something else must not get an artifact."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    forward = Qwen3MoeExperts.forward

    def doubled(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return forward(self, hidden_states, top_k_index, top_k_weights**2)

    monkeypatch.setattr(Qwen3MoeExperts, "forward", doubled)
    with pytest.raises(CalibrationError, match=r"experts: its experts times their weights differ"):
        calibration(tiny("qwen3_moe"), out).run()


def test_checkpoints_that_cannot_be_read(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and no such model"):
        StreamedModel("nobody/no-such-model")
    with pytest.raises(CheckpointError, match="no safetensors checkpoint"):
        StreamedModel(str(tmp_path))
    folder = copied(tiny("qwen3_moe"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        StreamedModel(str(folder))
