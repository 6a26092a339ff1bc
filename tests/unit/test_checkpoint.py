"""Checkpoints: headers, fingerprints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_moe_routing.checkpoint import (
    find_checkpoint,
    fingerprint,
    layers_without_experts,
    read_headers,
)
from sglang_moe_routing.errors import CheckpointError


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}.{name}.weight" for i in range(3) for name in ("gate", "up")]
    return {name: torch.randn(8, 300, generator=generator) for name in names}


def single(folder: Path, content: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / "model.safetensors")
    return folder


def sharded(folder: Path, content: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(content)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: content[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_headers_tell_names_dtypes_shapes_and_places(tmp_path: Path) -> None:
    content = tensors()
    found = read_headers(single(tmp_path / "a", content))
    assert list(found) == sorted(content)
    for name, stored in found.items():
        assert (stored.dtype, stored.shape) == ("F32", (8, 300))
        raw = stored.file.read_bytes()[stored.start : stored.stop]
        assert raw == content[name].numpy().tobytes()


def test_shards_have_the_fingerprint_of_one_file(tmp_path: Path) -> None:
    one, many = single(tmp_path / "one", tensors()), sharded(tmp_path / "many", tensors())
    assert fingerprint(read_headers(one)) == fingerprint(read_headers(many))


def test_other_values_keep_the_structure_only(tmp_path: Path) -> None:
    """A fine-tune; one tensor's change is enough in a model of few tensors."""
    mine = fingerprint(read_headers(single(tmp_path / "a", tensors())))
    tuned = tensors()
    tuned["layers.1.up.weight"] += 0.01
    theirs = fingerprint(read_headers(single(tmp_path / "b", tuned)))
    assert theirs.structure == mine.structure
    assert theirs.weights != mine.weights


def test_another_dtype_is_another_structure(tmp_path: Path) -> None:
    mine = fingerprint(read_headers(single(tmp_path / "a", tensors())))
    halved = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    theirs = fingerprint(read_headers(single(tmp_path / "b", halved)))
    assert theirs.structure != mine.structure


def test_thousands_of_tensors_are_sampled(tmp_path: Path) -> None:
    """Every third of 3,000: what lies between may change unseen, most changes cannot."""
    content = {f"t{i:04}": torch.full((2,), float(i)) for i in range(3000)}
    mine = fingerprint(read_headers(single(tmp_path / "a", content)))
    tuned = {name: tensor + 1 for name, tensor in content.items()}
    theirs = fingerprint(read_headers(single(tmp_path / "b", tuned)))
    assert theirs.weights != mine.weights


# --- refused -------------------------------------------------------------------------------------


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_headers(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a", tensors())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-1\.safetensors, which is not there"):
        read_headers(folder)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}x", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    if content.endswith(b"{}x"):
        assert read_headers(tmp_path) == {}
        return
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
        read_headers(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = single(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated: .* bytes, its header says"):
        read_headers(tmp_path)


def test_models_of_the_hub_are_found_in_its_cache(tmp_path: Path) -> None:
    """As the hub's own library lays them out; nothing is fetched."""
    folder = tmp_path / "models--team--tiny"
    snapshot = single(folder / "snapshots" / "0123abcd", tensors())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    found = find_checkpoint("team/tiny", cache=str(tmp_path))
    assert found == snapshot
    assert fingerprint(read_headers(found)) == fingerprint(read_headers(snapshot))


def test_models_that_are_nowhere(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "none"), str(tmp_path / "file"), "./none"):
        with pytest.raises(CheckpointError, match="not a folder"):
            find_checkpoint(name)
    with pytest.raises(CheckpointError, match="hf download nobody/nothing"):
        find_checkpoint("nobody/nothing", cache=str(tmp_path))


EXPERT_NAMES = [
    "model.layers.{}.mlp.experts.0.gate_proj.weight",
    "model.layers.{}.mlp.experts.gate_up_proj",
    "model.layers.{}.mlp.experts.down_proj_blocks",
    "model.layers.{}.block_sparse_moe.experts.7.w1.weight",
    "language_model.model.layers.{}.feed_forward.experts.gate_up_proj",
    "layers.{}.ffn.experts.0.w2.weight",
    "backbone.layers.{}.mixer.experts.3.up_proj.weight",
]


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_a_layer_without_experts_is_found_whatever_experts_are_called(name: str) -> None:
    stack = name.partition("{}")[0]
    common = [f"{stack}{i}.{part}" for i in range(4) for part in ("norm.w", "shared_experts.w")]
    routed = [name.format(i) for i in (1, 2)]
    assert layers_without_experts([*common, *routed], [1, 2, 3]) == [3]
    assert layers_without_experts([*common, *routed], [1, 2]) == []


def test_checkpoints_whose_experts_cannot_be_recognised_are_not_judged() -> None:
    names = [f"model.layers.{i}.block_sparse_moe.input_linear.weight" for i in range(3)]
    draft = ["mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp.layers.0.norm.weight"]
    assert layers_without_experts([*names, *draft], range(3)) == []
    assert layers_without_experts([], range(3)) == []
