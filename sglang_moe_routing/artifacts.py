"""Similarity artifacts: one safetensors file with an N x N expert-similarity matrix per MoE layer.

A file holds one tensor ``similarity.<layer id>`` (float16 or float32, ``[N, N]``) per layer and
string metadata that says where the matrices come from. Row ``u`` of a matrix answers "which
expert can stand in for ``u``": larger is closer (SERE, arXiv 2602.07616, section 3). Where the
metric has coefficients there is a tensor ``coefficient.<layer id>`` of the same shape beside each:
entry ``[u, v]`` is what the slot's weight is multiplied by when ``v`` stands in for ``u``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .checkpoint import Fingerprint
from .errors import ArtifactError, shorten

FORMAT = "sglang-moe-routing/similarity"
PREFIX = "similarity."
COEFFICIENT_PREFIX = "coefficient."
FORMAT_VERSIONS = {"1": (PREFIX,), "2": (PREFIX, COEFFICIENT_PREFIX)}
"""Tensors by version. A file has the lowest that can hold it, so that older releases read it."""
DTYPES = (torch.float16, torch.float32)
TOLERANCE = 2e-3  # float16 resolution near 1, twice


@dataclass(frozen=True)
class Metric:
    """What a similarity metric says of v as a stand-in for u, and what values it can take."""

    meaning: str
    symmetric: bool = True
    lowest: float = 0.0
    highest: float = 1.0
    has_coefficients: bool = False


METRICS: Mapping[str, Metric] = {
    "frobenius": Metric("1 - distance of their outputs / the layer's largest"),
    "cosine": Metric("(cosine of their outputs + 1) / 2"),
    "cka": Metric("centred kernel alignment of their outputs"),
    "weights": Metric("(cosine on white noise + 1) / 2"),
    "router": Metric("(cosine of their router rows + 1) / 2"),
    "routed": Metric(
        "1 - relative error of v for u; 0: as bad as dropping u",
        symmetric=False,
        lowest=float("-inf"),
    ),
    "joint": Metric(
        "as routed, other secondary experts replaced too",
        symmetric=False,
        lowest=float("-inf"),
        highest=float("inf"),
    ),
    "least_squares": Metric(
        "share of u's output that the best multiple of v explains",
        symmetric=False,
        has_coefficients=True,
    ),
}


@dataclass(frozen=True)
class SimilarityArtifact:
    """Similarity matrices of one model.

    Attributes:
        matrices: layer id -> ``[N, N]`` float16/float32 matrix on the CPU.
        metric: one of `METRICS`.
        model: name of the model that was calibrated.
        details: free-form provenance (calibration data, sizes, versions, date), JSON values.
        fingerprint: of the weights that were calibrated; None if they are not known.
        sha256: digest of the file it was read from, empty if it was made in memory.
        coefficients: layer id -> ``[N, N]`` float16/float32 in [0, 1] on the CPU, for the layers of
            `matrices`; empty where the metric has none.
    """

    matrices: Mapping[int, Tensor]
    metric: str
    model: str
    details: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    sha256: str = ""
    coefficients: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return next(iter(self.matrices.values())).shape[0]

    @property
    def layers(self) -> list[int]:
        return sorted(self.matrices)


def save_artifact(artifact: SimilarityArtifact, path: str | Path) -> None:
    """Validate and write `artifact`; the file is whole as soon as it has its name.

    Raises:
        ArtifactError: its matrices or coefficients are not usable, or the file cannot be written.
    """
    path = Path(path)
    _validate(artifact, path)
    metadata = {
        "format": FORMAT,
        "format_version": "2" if artifact.coefficients else "1",
        "metric": artifact.metric,
        "model": artifact.model,
        "details": json.dumps(artifact.details, sort_keys=True),
    }
    if artifact.fingerprint is not None:
        metadata["fingerprint"] = json.dumps(asdict(artifact.fingerprint), sort_keys=True)
    stored = {PREFIX: artifact.matrices, COEFFICIENT_PREFIX: artifact.coefficients}
    tensors = {
        f"{prefix}{layer}": matrix.clone().contiguous()
        for prefix, matrices in stored.items()
        for layer, matrix in matrices.items()
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(unfinished), metadata)
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_artifact(path: str | Path) -> SimilarityArtifact:
    """Read and validate a similarity artifact.

    Raises:
        ArtifactError: missing or foreign file, unknown version or metric, wrong shape or dtype, a
            matrix that is not finite, not symmetric where the metric is, or outside its range;
            coefficients that are missing, or of a metric without.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()  # once: the file may be replaced at any time
        tensors = load(raw)
        header_bytes = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + header_bytes]).get("__metadata__", {})
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such similarity artifact") from None
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype torch lacks
        raise ArtifactError(f"{path}: not a readable safetensors file: {error}") from error
    version = metadata.get("format_version")
    if metadata.get("format") != FORMAT or version not in FORMAT_VERSIONS:
        raise ArtifactError(
            f"{path}: format is {shorten(metadata.get('format'))} version {shorten(version)}, "
            f"expected {FORMAT!r} version {' or '.join(FORMAT_VERSIONS)}"
        )
    found: dict[str, dict[int, Tensor]] = {PREFIX: {}, COEFFICIENT_PREFIX: {}}
    for name in sorted(tensors):
        prefix, layer = _split(name, FORMAT_VERSIONS[version], path)
        found[prefix][layer] = tensors[name]
    artifact = SimilarityArtifact(
        matrices=found[PREFIX],
        metric=metadata.get("metric", ""),
        model=metadata.get("model", ""),
        details=_json_object(metadata, "details", path),
        fingerprint=_fingerprint(metadata, path),
        sha256=hashlib.sha256(raw).hexdigest(),
        coefficients=found[COEFFICIENT_PREFIX],
    )
    _validate(artifact, path)
    return artifact


def _split(name: str, prefixes: Sequence[str], path: Path) -> tuple[str, int]:
    """Prefix and layer id of a tensor's name."""
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    suffix = name.removeprefix(prefix)
    if not prefix or not suffix.isdecimal() or suffix != str(int(suffix)):
        expected = " or ".join(f"'{prefix}<layer id>'" for prefix in prefixes)
        raise ArtifactError(f"{path}: unexpected tensor {shorten(name)}, expected {expected}")
    return prefix, int(suffix)


def _json_object(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: metadata {key!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: metadata {key!r} is {shorten(value)}, expected a JSON object")
    return value


def _fingerprint(metadata: Mapping[str, str], path: Path) -> Fingerprint | None:
    if "fingerprint" not in metadata:
        return None
    digests = _json_object(metadata, "fingerprint", path)
    if set(digests) != {"structure", "weights"}:
        raise ArtifactError(
            f"{path}: metadata 'fingerprint' has {sorted(digests)}, expected structure and weights"
        )
    return Fingerprint(**digests)


def _validate(artifact: SimilarityArtifact, path: Path) -> None:
    if artifact.metric not in METRICS:
        raise ArtifactError(
            f"{path}: unknown metric {shorten(artifact.metric)}; known: {', '.join(METRICS)}"
        )
    if not artifact.matrices:
        raise ArtifactError(f"{path}: holds no similarity matrix")
    metric = METRICS[artifact.metric]
    first = next(iter(artifact.matrices.values()))
    num_experts = first.shape[0] if first.ndim and first.shape[0] else 1
    for layer, matrix in artifact.matrices.items():
        where = f"{path}: {PREFIX}{layer}"
        _validate_shape(matrix, num_experts, where)
        _validate_values(matrix.float(), metric, where)
    _validate_coefficients(artifact, num_experts, path)


def _validate_coefficients(artifact: SimilarityArtifact, num_experts: int, path: Path) -> None:
    expected = set(artifact.matrices) if METRICS[artifact.metric].has_coefficients else set()
    for layer in sorted(expected ^ set(artifact.coefficients)):
        problem = "missing" if layer in expected else "not expected"
        raise ArtifactError(
            f"{path}: {COEFFICIENT_PREFIX}{layer} is {problem}: metric {artifact.metric!r} with "
            f"matrices of layers {artifact.layers} has coefficients of layers {sorted(expected)}"
        )
    for layer, matrix in artifact.coefficients.items():
        where = f"{path}: {COEFFICIENT_PREFIX}{layer}"
        _validate_shape(matrix, num_experts, where)
        _validate_range(matrix.float(), 0.0, 1.0, where)
        _validate_diagonal(matrix.float(), where)


def _validate_shape(matrix: Tensor, num_experts: int, where: str) -> None:
    if matrix.dtype not in DTYPES:
        raise ArtifactError(f"{where}: dtype is {matrix.dtype}, expected float16 or float32")
    if matrix.shape != (num_experts, num_experts):
        raise ArtifactError(
            f"{where}: shape is {tuple(matrix.shape)}, expected {(num_experts, num_experts)}"
        )


def _validate_values(matrix: Tensor, metric: Metric, where: str) -> None:
    _validate_range(matrix, metric.lowest, metric.highest, where, TOLERANCE)
    _validate_diagonal(matrix, where)
    skew = float((matrix - matrix.T).abs().max())
    if metric.symmetric and skew > TOLERANCE:
        raise ArtifactError(f"{where}: asymmetric by {skew:.4g}, but its metric is symmetric")


def _validate_range(
    matrix: Tensor, lowest: float, highest: float, where: str, tolerance: float = 0.0
) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise ArtifactError(f"{where}: has NaN or infinite values")
    low, high = float(matrix.min()), float(matrix.max())
    if low < lowest - tolerance or high > highest + tolerance:
        raise ArtifactError(
            f"{where}: values span [{low:.7g}, {high:.7g}], expected [{lowest}, {highest}]"
        )


def _validate_diagonal(matrix: Tensor, where: str) -> None:
    off = float((matrix.diagonal() - 1).abs().max())
    if off > TOLERANCE:
        raise ArtifactError(f"{where}: diagonal is off 1 by {off:.4g}")
