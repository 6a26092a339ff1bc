"""The weights that a process serves, and what may take their place while it does.

Similarity artifacts are made for certain weights. A policy that uses one must not go on under
others, unless its config allows that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..artifacts import SimilarityArtifact
from ..checkpoint import Fingerprint, find_checkpoint, fingerprint, read_headers
from ..config import LoadedConfig
from ..errors import ArtifactError, CheckpointError
from .definitions import Definition

logger = logging.getLogger(__name__)

CHECKPOINT_FORMATS = frozenset(
    {
        *("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
        *("layered", "bitsandbytes", "flash_rl"),
    }
)
"""SGLang's load formats that read the safetensors files of a checkpoint as they lie there."""


@dataclass(frozen=True)
class ServedWeights:
    """What is known of the weights of a loaded model.

    Attributes:
        name: the checkpoint, or how else they came, for messages.
        fingerprint: None if they cannot be told from others.
        problem: why they cannot.
    """

    name: str
    fingerprint: Fingerprint | None = None
    problem: str = ""

    @classmethod
    def of_checkpoint(
        cls,
        model: str,
        load_format: str = "auto",
        revision: str | None = None,
        cache: str | None = None,
    ) -> ServedWeights:
        """Those of a checkpoint as it lies on disk now: its files may change after it was read."""
        if load_format not in CHECKPOINT_FORMATS:
            return cls(model, problem=f"load format {load_format!s} may load others than its files")
        try:
            headers = read_headers(find_checkpoint(model, revision=revision, cache=cache))
            return cls(model, fingerprint(headers))
        except (CheckpointError, OSError) as error:
            return cls(model, problem=str(error))

    @classmethod
    def at_start(cls, flags: Any) -> ServedWeights:
        """Those that a server with these flags, as SGLang resolves them, loads when it starts."""
        return cls.of_checkpoint(
            flags.model_path, flags.load_format, flags.revision, flags.download_dir
        )


def unknown(how: str) -> ServedWeights:
    """Weights that came in another way than from a checkpoint."""
    return ServedWeights(how, problem="nothing tells which they are")


NO_WEIGHTS = unknown("no model")


def check_weights(
    loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact], weights: ServedWeights
) -> None:
    """Hold the artifacts of a config to the weights that its policies meet.

    Raises:
        ArtifactError: an artifact was made for others and does not allow them.
    """
    sources = loaded.config.similarity
    for name, artifact in artifacts.items():
        found = _difference(name, artifact, weights)
        if found and sources[name].allow_other_weights:
            logger.warning("%s; allowed by similarity.%s.allow_other_weights", found, name)
        elif found:
            raise ArtifactError(
                f"{found}; calibrate the model that is served, or set "
                f"similarity.{name}.allow_other_weights: true in {loaded.path} for another "
                "fine-tune or a quantised copy of the same model"
            )


def check_former(
    definitions: Iterable[Definition],
    artifacts: Mapping[str, SimilarityArtifact],
    weights: ServedWeights,
) -> None:
    """The same for what running requests keep of former configs.

    Args:
        artifacts: those of the config in force, which `check_weights` speaks for.

    Raises:
        ArtifactError: a definition uses an artifact that was made for others.
    """
    present = {artifact.sha256 for artifact in artifacts.values()}
    for definition in definitions:
        artifact = definition.artifact
        if artifact is None or artifact.sha256 in present:
            continue
        found = _difference(definition.name, artifact, weights)
        if found:
            raise ArtifactError(
                f"{found}; a running request keeps policy {definition.name!r} of a former config: "
                "wait until it ends"
            )


def _difference(name: str, artifact: SimilarityArtifact, weights: ServedWeights) -> str:
    """How `weights` differ from those that were calibrated; empty if they do not."""
    where = f"similarity artifact {name!r} (made for {artifact.model or 'an unnamed model'})"
    mine, served = artifact.fingerprint, weights.fingerprint
    if mine is None:
        return f"{where} does not say for which weights it was made"
    if served is None:
        return f"{where} cannot be held to the weights of {weights.name}: {weights.problem}"
    if served == mine:
        return ""
    if served.structure != mine.structure:
        return (
            f"{where} was made for a checkpoint with tensors of other names, dtypes or shapes than "
            f"{weights.name}"
        )
    return (
        f"{where} was made for other weights than {weights.name}: fingerprint "
        f"{mine.weights[:12]}, served {served.weights[:12]}"
    )
