"""scripts/models/make_bench_model.py, at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.models import make_bench_model as maker

SMALL = maker.Shape(
    layers=2,
    hidden=64,
    moe_intermediate=16,
    experts=128,
    top_k=8,
    heads=4,
    kv_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.make(tmp_path_factory.mktemp("models") / "small", SMALL, seed=3)


def test_defaults_are_a_layer_of_qwen3_30b_a3b() -> None:
    config = maker.config(maker.Shape(), {"vocab_size": 2048})
    wanted = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 4,
    }
    assert {name: config[name] for name in wanted} == wanted


def test_transformers_loads_every_weight(folder: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size


def test_index_lists_every_tensor_of_every_file(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, size = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        found |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert index == {"metadata": {"total_size": size}, "weight_map": found}
    assert len(set(found.values())) == 3  # one file a layer, one for the rest


def test_weights_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    again = maker.make(tmp_path / "again", SMALL, seed=3)
    other = maker.make(tmp_path / "other", SMALL, seed=4)
    name = "model-00002-of-00003.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_router_is_as_sure_as_the_trained_ones(folder: Path) -> None:
    for std, mass in maker.measure(folder):
        assert std == pytest.approx(1.7, abs=0.1)  # sampling error of 64 x 128 weights
        assert mass == pytest.approx(0.53, abs=0.03)
