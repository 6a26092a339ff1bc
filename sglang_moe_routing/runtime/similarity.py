"""The similarity artifacts that a routing config names, held to the policies' thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from ..artifacts import METRICS, SimilarityArtifact, load_artifact
from ..config import LoadedConfig
from ..errors import ArtifactError, ConfigError
from ..policies import Policy, Schedule, Sizes
from .weights import ServedWeights, check_weights

THRESHOLD = "threshold"


def load_similarities(loaded: LoadedConfig) -> dict[str, SimilarityArtifact]:
    """Read every artifact of a config, also those that no policy uses.

    Raises:
        ArtifactError: an artifact is missing or damaged.
        ConfigError: a policy's threshold lies above every value of its artifact's metric.
    """
    artifacts = {name: load_artifact(path) for name, path in loaded.similarity_paths.items()}
    for problem in _unreachable(loaded, artifacts):
        raise ConfigError(f"{loaded.path}: {problem}")
    return artifacts


def idle_thresholds(loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact]) -> list[str]:
    """Thresholds above every similarity that their artifact holds: legal, but vanilla."""
    return [
        f"policies.{name}.{THRESHOLD}: {min(thresholds)} is above {highest:.4g}, the highest "
        f"similarity of two experts in artifact {source!r}: no expert is ever re-routed"
        for name, source, thresholds in _users(loaded)
        if thresholds and min(thresholds) > (highest := _highest(artifacts[source]))
    ]


def _highest(artifact: SimilarityArtifact) -> float:
    pairs = (matrix.float().clone().fill_diagonal_(-inf) for matrix in artifact.matrices.values())
    return max(float(matrix.max()) for matrix in pairs)


def _users(loaded: LoadedConfig) -> Iterator[tuple[str, str, list[float]]]:
    """Policies that use an artifact: name, artifact and thresholds."""
    for name, policy in zip(loaded.config.names, loaded.config.definitions, strict=True):
        source = loaded.config.artifact_of(name)
        if source is not None:
            yield name, source, _thresholds(policy)


def _unreachable(loaded: LoadedConfig, artifacts: dict[str, SimilarityArtifact]) -> Iterator[str]:
    """Thresholds that no similarity reaches: such a policy would silently be vanilla."""
    for name, source, thresholds in _users(loaded):
        metric = artifacts[source].metric
        highest = METRICS[metric].highest
        for value in thresholds:
            if value > highest:
                yield (
                    f"policies.{name}.{THRESHOLD}: {value} is above {highest:g}, the highest value "
                    f"of the metric {metric!r} of artifact {source!r}: no expert would ever be "
                    "re-routed. Thresholds are not comparable across metrics"
                )


def _thresholds(policy: Policy) -> list[float]:
    value = getattr(policy, THRESHOLD, None)
    return list(value.values()) if isinstance(value, Schedule) else []


def check_artifacts(
    loaded: LoadedConfig,
    artifacts: Mapping[str, SimilarityArtifact],
    sizes: Mapping[int, Sizes],
    weights: ServedWeights,
) -> None:
    """Hold the artifacts of a config to the served model.

    Args:
        sizes: of the routed layers, by layer id.
        weights: those of the model.

    Raises:
        ArtifactError: an artifact does not fit.
    """
    for name, artifact in artifacts.items():
        _check_layers(name, artifact, sizes)
    check_weights(loaded, artifacts, weights)


def _check_layers(name: str, artifact: SimilarityArtifact, sizes: Mapping[int, Sizes]) -> None:
    where = f"similarity artifact {name!r}"
    missing = sorted(set(sizes) - set(artifact.layers))
    if missing:
        raise ArtifactError(
            f"{where} has no matrix for MoE layers {missing} of this model; it has layers "
            f"{artifact.layers} (made for {artifact.model or 'an unnamed model'})"
        )
    for layer, size in sizes.items():
        if artifact.matrices[layer].shape[0] != size.num_experts:
            raise ArtifactError(
                f"{where} is for {artifact.matrices[layer].shape[0]} experts, but layer {layer} "
                f"of this model has {size.num_experts} "
                f"(made for {artifact.model or 'an unnamed model'})"
            )
