"""The similarity artifacts that a routing config names, held to the policies' thresholds."""

from __future__ import annotations

from collections.abc import Iterator

from .artifacts import METRICS, SimilarityArtifact, load_artifact
from .config import LoadedConfig
from .errors import ConfigError
from .policies import Policy, Schedule

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


def _unreachable(loaded: LoadedConfig, artifacts: dict[str, SimilarityArtifact]) -> Iterator[str]:
    """Thresholds that no similarity reaches: such a policy would silently be vanilla."""
    for name, policy in zip(loaded.config.names, loaded.config.definitions, strict=True):
        source = loaded.config.artifact_of(name)
        if source is None:
            continue
        metric = artifacts[source].metric
        highest = METRICS[metric].highest
        for value in _thresholds(policy):
            if value > highest:
                yield (
                    f"policies.{name}.{THRESHOLD}: {value} is above {highest:g}, the highest value "
                    f"of the metric {metric!r} of artifact {source!r}: no expert would ever be "
                    "re-routed. Thresholds are not comparable across metrics"
                )


def _thresholds(policy: Policy) -> list[float]:
    value = policy.parameters().get(THRESHOLD)
    if value is None:
        return []
    return list(value.values()) if isinstance(value, Schedule) else [value]
