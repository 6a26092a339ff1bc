"""Similarity artifacts: one safetensors file with an N x N expert-similarity matrix per MoE layer.

A file holds one tensor ``similarity.<layer id>`` (float16 or float32, ``[N, N]``) per layer and
string metadata that says where the matrices come from. Row ``u`` of a matrix answers "which
expert can stand in for ``u``": larger is closer (SERE, arXiv 2602.07616, section 3).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .checkpoint import Fingerprint
from .errors import ArtifactError, shorten

FORMAT = "sglang-moe-routing/similarity"
FORMAT_VERSION = 1
PREFIX = "similarity."
DTYPES = (torch.float16, torch.float32)


@dataclass(frozen=True)
class Metric:
    """What values a similarity metric can take."""

    symmetric: bool
    lowest: float
    highest: float = 1.0


METRICS: Mapping[str, Metric] = {
    "frobenius": Metric(symmetric=True, lowest=0.0),
    "cosine": Metric(symmetric=True, lowest=0.0),
    "cka": Metric(symmetric=True, lowest=0.0),
    "weights": Metric(symmetric=True, lowest=0.0),
    "router": Metric(symmetric=True, lowest=0.0),
    "routed": Metric(symmetric=False, lowest=float("-inf")),
    "joint": Metric(symmetric=False, lowest=float("-inf"), highest=float("inf")),
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
    """

    matrices: Mapping[int, Tensor]
    metric: str
    model: str
    details: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    sha256: str = ""

    @property
    def num_experts(self) -> int:
        return next(iter(self.matrices.values())).shape[0]

    @property
    def layers(self) -> list[int]:
        return sorted(self.matrices)


def save_artifact(artifact: SimilarityArtifact, path: str | Path) -> None:
    """Validate and write `artifact`; the file is whole as soon as it has its name.

    Raises:
        ArtifactError: its matrices are not usable, or the file cannot be written.
    """
    path = Path(path)
    _validate(artifact, path)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "metric": artifact.metric,
        "model": artifact.model,
        "details": json.dumps(artifact.details, sort_keys=True),
    }
    if artifact.fingerprint is not None:
        metadata["fingerprint"] = json.dumps(artifact.fingerprint.as_json(), sort_keys=True)
    tensors = {f"{PREFIX}{i}": m.clone().contiguous() for i, m in artifact.matrices.items()}
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
        ArtifactError: missing or foreign file, unknown metric, wrong shape or dtype, a matrix
            that is not finite, not symmetric where the metric is, or outside its range.
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
    if metadata.get("format") != FORMAT or metadata.get("format_version") != str(FORMAT_VERSION):
        raise ArtifactError(
            f"{path}: format is {shorten(metadata.get('format'))} version "
            f"{shorten(metadata.get('format_version'))}, expected {FORMAT!r} version "
            f"{FORMAT_VERSION}"
        )
    artifact = SimilarityArtifact(
        matrices={_layer_id(name, path): tensors[name] for name in sorted(tensors)},
        metric=metadata.get("metric", ""),
        model=metadata.get("model", ""),
        details=_json_object(metadata, "details", path),
        fingerprint=_fingerprint(metadata, path),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    _validate(artifact, path)
    return artifact


def _layer_id(name: str, path: Path) -> int:
    suffix = name.removeprefix(PREFIX)
    if suffix == name or not suffix.isdecimal() or suffix != str(int(suffix)):
        raise ArtifactError(
            f"{path}: unexpected tensor {shorten(name)}, expected '{PREFIX}<layer id>'"
        )
    return int(suffix)


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
        if matrix.dtype not in DTYPES:
            raise ArtifactError(f"{where}: dtype is {matrix.dtype}, expected float16 or float32")
        if matrix.shape != (num_experts, num_experts):
            raise ArtifactError(
                f"{where}: shape is {tuple(matrix.shape)}, expected {(num_experts, num_experts)}"
            )
        _validate_values(matrix.float(), metric, where)


def _validate_values(matrix: Tensor, metric: Metric, where: str) -> None:
    tolerance = 2e-3  # float16 resolution near 1, twice
    if not bool(torch.isfinite(matrix).all()):
        raise ArtifactError(f"{where}: has NaN or infinite values")
    low, high = float(matrix.min()), float(matrix.max())
    if low < metric.lowest - tolerance or high > metric.highest + tolerance:
        raise ArtifactError(
            f"{where}: values span [{low:.4g}, {high:.4g}], "
            f"expected [{metric.lowest}, {metric.highest}]"
        )
    off = float((matrix.diagonal() - 1).abs().max())
    if off > tolerance:
        raise ArtifactError(f"{where}: diagonal is off 1 by {off:.4g}")
    skew = float((matrix - matrix.T).abs().max())
    if metric.symmetric and skew > tolerance:
        raise ArtifactError(f"{where}: asymmetric by {skew:.4g}, but its metric is symmetric")
