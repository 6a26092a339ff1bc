"""Similarity artifacts: what is saved comes back, and what is unusable is refused by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sglang_moe_routing.artifacts import (
    FORMAT,
    METRICS,
    SimilarityArtifact,
    load_artifact,
    save_artifact,
)
from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import ArtifactError, RoutingError
from sglang_moe_routing.runtime.similarity import idle_thresholds, load_similarities

N = 4
GOOD_METADATA = {
    "format": FORMAT,
    "format_version": "1",
    "metric": "frobenius",
    "model": "tiny",
    "details": "{}",
}


def matrix(dtype: torch.dtype = torch.float32, seed: int = 0, size: int = N) -> Tensor:
    """A symmetric matrix in [0, 1] with diagonal 1."""
    half = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return ((half + half.T) / 2).fill_diagonal_(1.0).to(dtype)


def changed(row: int, column: int, value: float, both: bool = True) -> Tensor:
    """A good matrix with one entry, and unless told otherwise its mirror image, replaced."""
    made = matrix()
    made[row, column] = value
    if both:
        made[column, row] = value
    return made


def artifact(matrices: dict[int, Tensor] | None = None, **more: Any) -> SimilarityArtifact:
    """With the matrices as coefficients too, where the metric has some."""
    fields: dict[str, Any] = {"metric": "frobenius", "model": "tiny", **more}
    matrices = {0: matrix()} if matrices is None else matrices
    metric = METRICS.get(fields["metric"])
    if metric is not None and metric.has_coefficients:
        fields.setdefault("coefficients", matrices)
    return SimilarityArtifact(matrices=matrices, **fields)


def write(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> Path:
    """A safetensors file with good metadata except for what is given; None leaves a key out."""
    merged = {**GOOD_METADATA, **metadata}
    kept = {key: value for key, value in merged.items() if value is not None}
    save_file({"similarity.0": matrix()} if tensors is None else tensors, str(path), kept)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "similarity.safetensors"


# --- round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_saved_is_loaded(path: Path, metric: str, dtype: torch.dtype) -> None:
    """Matrices come back bit for bit in their dtype, with metric, model and details."""
    details = {"tokens": 51200, "data": "c4", "nested": {"list": [1, 2.5, None, "ü"]}}
    matrices = {7: matrix(dtype, 1), 0: matrix(dtype, 2), 12: matrix(dtype, 3)}
    save_artifact(artifact(matrices, metric=metric, details=details), path)
    got = load_artifact(str(path))
    assert (got.metric, got.model, got.details) == (metric, "tiny", details)
    assert got.layers == [0, 7, 12]
    assert got.num_experts == N
    for layer, made in matrices.items():
        assert got.matrices[layer].dtype == dtype
        assert torch.equal(got.matrices[layer], made)
    assert bool(got.coefficients) == METRICS[metric].has_coefficients


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_coefficients_that_are_saved_are_loaded(path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, asymmetric and of a dtype of their own, views and shared tensors included."""
    stack = torch.rand(2, N, N, generator=torch.Generator().manual_seed(5)).to(dtype)
    made = {7: stack[0].fill_diagonal_(1), 0: stack[1].fill_diagonal_(1).T}
    matrices = {7: matrix(), 0: matrix()}
    save_artifact(artifact(matrices, metric="least_squares", coefficients=made), path)
    got = load_artifact(path)
    assert sorted(got.coefficients) == got.layers == [0, 7]
    for layer, coefficients in made.items():
        assert got.coefficients[layer].dtype == dtype
        assert torch.equal(got.coefficients[layer], coefficients)
        assert torch.equal(got.matrices[layer], matrices[layer])


def test_a_loaded_artifact_carries_the_digest_of_its_file(path: Path) -> None:
    """The digest is the file's sha256; an artifact made in memory has none."""
    made = artifact()
    save_artifact(made, path)
    assert made.sha256 == ""
    assert load_artifact(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_can_be_read_with_safetensors_alone(path: Path) -> None:
    """Tensor names and metadata are as documented, for other tools."""
    save_artifact(artifact({3: matrix()}), path)
    with safe_open(str(path), framework="pt") as file:
        assert list(file.keys()) == ["similarity.3"]
        assert file.metadata() == GOOD_METADATA
    save_artifact(artifact({3: matrix()}, metric="least_squares"), path)
    with safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == ["coefficient.3", "similarity.3"]
        assert file.metadata() == {
            **GOOD_METADATA,
            "format_version": "2",
            "metric": "least_squares",
        }


def test_transposed_and_sliced_matrices_can_be_saved(path: Path) -> None:
    """Views into a larger tensor are written as matrices of their own."""
    stack = torch.stack((matrix(seed=1), matrix(seed=2)))
    save_artifact(artifact({0: stack[0].T, 1: stack[1]}), path)
    got = load_artifact(path)
    assert torch.equal(got.matrices[0], stack[0].T)
    assert torch.equal(got.matrices[1], stack[1])


def test_two_layers_may_share_one_matrix(path: Path) -> None:
    """The same tensor given for two layers is written for both."""
    shared = matrix()
    save_artifact(artifact({0: shared, 1: shared}), path)
    got = load_artifact(path)
    assert torch.equal(got.matrices[0], shared)
    assert torch.equal(got.matrices[1], shared)


def test_the_routed_metric_may_be_asymmetric_and_below_zero(path: Path) -> None:
    """A routed matrix need not be symmetric and may fall far below 0."""
    routed = changed(1, 2, -37.5, both=False)
    save_artifact(artifact({0: routed}, metric="routed"), path)
    assert torch.equal(load_artifact(path).matrices[0], routed)


def test_rounding_to_float16_is_forgiven(path: Path) -> None:
    """A matrix that is off by float16 rounding alone is not refused."""
    rounded = matrix().half()
    rounded[0, 0] = 1.001
    rounded[1, 2] += 0.0005
    rounded[2, 3] = rounded[3, 2] = -0.0005
    save_artifact(artifact({0: rounded}), path)
    assert torch.equal(load_artifact(path).matrices[0], rounded)


# --- refusals of both --------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BAD_MATRICES = {
    "bfloat16": (matrix(torch.bfloat16), "frobenius", "dtype is torch.bfloat16, expected"),
    "float64": (matrix(torch.float64), "frobenius", "dtype is torch.float64, expected"),
    "integers": (torch.eye(N).int(), "frobenius", "dtype is torch.int32, expected"),
    "wide": (torch.ones(N, N + 1), "frobenius", r"shape is \(4, 5\), expected \(4, 4\)"),
    "small": (matrix(size=3), "frobenius", r"shape is \(3, 3\), expected \(4, 4\)"),
    "vector": (torch.ones(N), "frobenius", r"shape is \(4,\), expected \(4, 4\)"),
    "cube": (torch.ones(N, N, 1), "frobenius", r"shape is \(4, 4, 1\), expected \(4, 4\)"),
    "NaN": (changed(0, 1, NAN), "frobenius", "has NaN or infinite values"),
    "infinite": (changed(0, 1, -INF), "routed", "has NaN or infinite values"),
    "below 0": (
        changed(0, 1, -0.01),
        "frobenius",
        r"values span \[-0.01, 1\], expected \[0.0, 1.0\]",
    ),
    "above 1": (changed(0, 1, 1.01), "cosine", r"values span .*1.01\], expected \[0.0, 1.0\]"),
    "routed above 1": (
        changed(0, 1, 1.01),
        "routed",
        r"values span .*1.01\], expected \[-inf, 1.0\]",
    ),
    "diagonal": (changed(2, 2, 0.5), "cka", "diagonal is off 1 by 0.5"),
    "routed diagonal": (changed(2, 2, 0.0), "routed", "diagonal is off 1 by 1"),
    "asymmetric": (
        changed(1, 2, 0.0, both=False),
        "frobenius",
        "asymmetric by 0.*, but its metric is symmetric",
    ),
    "asymmetric weights": (changed(1, 2, 0.0, both=False), "weights", "asymmetric by"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_an_unusable_matrix_is_refused_on_load_and_on_save(path: Path, case: str) -> None:
    """A bad matrix in any layer is refused by file and tensor name, and nothing is written."""
    bad, metric, message = BAD_MATRICES[case]
    where = rf"{path.name}: similarity\.9: {message}"
    with pytest.raises(ArtifactError, match=where):
        save_artifact(artifact({0: matrix(), 9: bad}, metric=metric), path)
    assert not path.exists()
    write(path, {"similarity.0": matrix(), "similarity.9": bad}, metric=metric)
    with pytest.raises(ArtifactError, match=where):
        load_artifact(path)


BAD_COEFFICIENTS = {
    "float64": (matrix(torch.float64), "dtype is torch.float64, expected"),
    "small": (matrix(size=3), r"shape is \(3, 3\), expected \(4, 4\)"),
    "scalar": (torch.tensor(1.0), r"shape is \(\), expected \(4, 4\)"),
    "NaN": (changed(0, 1, NAN), "has NaN or infinite values"),
    "infinite": (changed(0, 1, INF), "has NaN or infinite values"),
    "below 0": (changed(0, 1, -0.001), r"values span \[-0.001, 1\], expected \[0.0, 1.0\]"),
    "above 1": (changed(0, 1, 1.001), r"values span .*1.001\], expected \[0.0, 1.0\]"),
    "diagonal": (changed(2, 2, 0.5), "diagonal is off 1 by 0.5"),
}


@pytest.mark.parametrize("case", BAD_COEFFICIENTS)
def test_unusable_coefficients_are_refused_on_load_and_on_save(path: Path, case: str) -> None:
    """By file and tensor name; a weight's factor has no tolerance beyond [0, 1]."""
    bad, message = BAD_COEFFICIENTS[case]
    where = rf"{path.name}: coefficient\.9: {message}"
    made = {0: matrix(), 9: matrix()}
    with pytest.raises(ArtifactError, match=where):
        save_artifact(artifact(made, metric="least_squares", coefficients={**made, 9: bad}), path)
    assert not path.exists()
    tensors = {
        f"{kind}.{layer}": matrix() for kind in ("similarity", "coefficient") for layer in made
    }
    write(path, {**tensors, "coefficient.9": bad}, metric="least_squares", format_version="2")
    with pytest.raises(ArtifactError, match=where):
        load_artifact(path)


@pytest.mark.parametrize(
    ("metric", "layers", "message"),
    [
        ("least_squares", [], r"coefficient\.0 is missing: .* of layers \[0, 9\]$"),
        ("least_squares", [0], r"coefficient\.9 is missing: .* of layers \[0, 9\]$"),
        ("least_squares", [0, 5, 9], r"coefficient\.5 is not expected: .* of layers \[0, 9\]$"),
        ("routed", [0, 9], r"coefficient\.0 is not expected: metric 'routed' .* layers \[\]$"),
    ],
)
def test_coefficients_of_other_layers_are_refused_on_load_and_on_save(
    path: Path, metric: str, layers: list[int], message: str
) -> None:
    """Each layer of a metric with coefficients has its own, and no other metric has any."""
    made, coefficients = {0: matrix(), 9: matrix()}, {layer: matrix() for layer in layers}
    with pytest.raises(ArtifactError, match=f"{path.name}: {message}"):
        save_artifact(artifact(made, metric=metric, coefficients=coefficients), path)
    assert not path.exists()
    tensors = {f"similarity.{layer}": m for layer, m in made.items()}
    tensors |= {f"coefficient.{layer}": m for layer, m in coefficients.items()}
    write(path, tensors, metric=metric, format_version="2")
    with pytest.raises(ArtifactError, match=f"{path.name}: {message}"):
        load_artifact(path)


def test_version_1_holds_no_coefficients(path: Path) -> None:
    tensors = {"similarity.0": matrix(), "coefficient.0": matrix()}
    write(path, tensors, metric="least_squares")
    message = r"unexpected tensor 'coefficient\.0', expected 'similarity\.<layer id>'$"
    with pytest.raises(ArtifactError, match=message):
        load_artifact(path)


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.ones(0, 0)], ids=["scalar", "empty"])
def test_a_matrix_without_experts_is_refused(path: Path, bad: Tensor) -> None:
    """A scalar or an empty matrix as the first layer is refused like any other wrong shape."""
    with pytest.raises(ArtifactError, match=rf"{path.name}: similarity\.0: "):
        save_artifact(artifact({0: bad}), path)
    write(path, {"similarity.0": bad})
    with pytest.raises(ArtifactError, match=rf"{path.name}: similarity\.0: "):
        load_artifact(path)


@pytest.mark.parametrize("metric", ["", "euclid", "Frobenius"])
def test_an_unknown_metric_is_refused_with_the_known_ones(path: Path, metric: str) -> None:
    """The message names the file, the metric and every metric there is."""
    message = rf"{path.name}: unknown metric '{metric}'; known: {', '.join(METRICS)}"
    with pytest.raises(ArtifactError, match=message):
        save_artifact(artifact(metric=metric), path)
    write(path, metric=metric)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(path)


def test_an_artifact_without_matrices_is_refused(path: Path) -> None:
    """There has to be at least one layer."""
    with pytest.raises(ArtifactError, match=f"{path.name}: holds no similarity matrix"):
        save_artifact(artifact({}), path)
    write(path, {})
    with pytest.raises(ArtifactError, match=f"{path.name}: holds no similarity matrix"):
        load_artifact(path)


def test_a_file_that_is_replaced_meanwhile_is_read_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and digest belong together, whenever another artifact takes the path."""
    read_bytes = Path.read_bytes

    def replace_and_read(self: Path) -> bytes:
        save_artifact(artifact({0: matrix(seed=2)}), path)
        return read_bytes(self)

    save_artifact(artifact({0: matrix(seed=1)}), path)
    digests = {hashlib.sha256(read_bytes(path)).hexdigest(): matrix(seed=1)}
    monkeypatch.setattr(Path, "read_bytes", replace_and_read)
    got = load_artifact(path)
    digests[hashlib.sha256(read_bytes(path)).hexdigest()] = matrix(seed=2)
    assert torch.equal(got.matrices[0], digests[got.sha256])


@pytest.mark.parametrize("threshold", ["0.7", "{default: 0.7, rows: {4: 0.8}}"])
def test_a_threshold_above_every_similarity_of_its_artifact_is_told(
    path: Path, threshold: str
) -> None:
    """It is within the metric's range, but no two experts are so alike; the diagonal is none."""
    likeness = torch.full((N, N), 0.2).fill_diagonal_(1.0)
    likeness[0, 1] = likeness[1, 0] = 0.6
    save_artifact(artifact({0: torch.eye(N), 1: likeness}), path)
    config = path.with_name("routing.yaml")
    config.write_text(
        f"version: 1\nsimilarity: {{a: {path}}}\npolicies:\n"
        f"  idle: {{kind: sere, num_primary: 1, threshold: {threshold}}}\n"
        "  acts: {kind: sere, num_primary: 1, threshold: {default: 0.7, rows: {4: 0.6}}}\n"
        "  maps: {kind: oea, k0: 1, mapped_share: 0.5}\n"
    )
    loaded = load_config(config)
    (doubt,) = idle_thresholds(loaded, load_similarities(loaded))
    assert doubt.startswith("policies.idle.threshold: 0.7 is above 0.6, the highest similarity of")


# --- refusals of load --------------------------------------------------------------------------


def test_a_missing_file_is_refused(path: Path) -> None:
    """The message says that there is no such file."""
    with pytest.raises(ArtifactError, match=f"{path.name}: no such similarity artifact"):
        load_artifact(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder is not an artifact."""
    with pytest.raises(ArtifactError, match=tmp_path.name):
        load_artifact(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tensor file at all", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(path: Path, content: bytes) -> None:
    """Bytes that are no safetensors file are refused by the file's name."""
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{path.name}: not a readable safetensors file"):
        load_artifact(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    """Half a download is refused."""
    save_artifact(artifact(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=f"{path.name}: not a readable safetensors file"):
        load_artifact(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", None), ("format", "pt"), ("format_version", None), ("format_version", "3")],
)
def test_a_foreign_format_is_refused(path: Path, key: str, value: str | None) -> None:
    """Another format or version is refused with what was found and what was expected."""
    write(path, None, **{key: value})
    with pytest.raises(
        ArtifactError,
        match=rf"{path.name}: format is .*{value!r}.*, expected '{FORMAT}' version 1 or 2",
    ):
        load_artifact(path)


def test_a_safetensors_file_without_metadata_is_refused(path: Path) -> None:
    """A plain weights file is not taken for an artifact."""
    save_file({"similarity.0": matrix()}, str(path))
    with pytest.raises(ArtifactError, match=f"{path.name}: format is None"):
        load_artifact(path)


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize(
    "name",
    [
        *("similarity", "similarity.", "similarity.x", "similarity.-1", "similarity.1.0", "w.1"),
        *("coefficient.", "coefficient.01", "coefficient.similarity.1"),
    ],
)
def test_a_foreign_tensor_is_refused(path: Path, name: str, version: str) -> None:
    """A tensor that is not '<what the version holds>.<layer id>' is refused by its name."""
    write(path, {"similarity.0": matrix(), name: matrix()}, format_version=version)
    with pytest.raises(ArtifactError, match=rf"{path.name}: unexpected tensor '{name}'"):
        load_artifact(path)


def test_two_tensors_for_one_layer_are_refused(path: Path) -> None:
    """'similarity.1' and 'similarity.01' cannot both be layer 1."""
    write(path, {"similarity.1": matrix(seed=1), "similarity.01": matrix(seed=2)})
    with pytest.raises(ArtifactError, match=rf"{path.name}: .*similarity\.0?1"):
        load_artifact(path)


@pytest.mark.parametrize("details", ["", "{", "[1]", "3", "null"])
def test_details_that_are_no_json_object_are_refused(path: Path, details: str) -> None:
    """Provenance has to be a JSON object; anything else is refused by the file's name."""
    write(path, details=details)
    with pytest.raises(ArtifactError, match=path.name):
        load_artifact(path)


def test_model_and_details_may_be_missing(path: Path) -> None:
    """Provenance is optional in a file made by another tool."""
    write(path, model=None, details=None)
    got = load_artifact(path)
    assert (got.model, got.details) == ("", {})


def test_artifact_errors_are_routing_errors_and_value_errors() -> None:
    """Callers may catch an ArtifactError as either of its bases."""
    assert issubclass(ArtifactError, RoutingError)
    assert issubclass(ArtifactError, ValueError)
