"""What one process knows of the routing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..artifacts import SimilarityArtifact
from ..config import LoadedConfig
from ..errors import EngineError
from .definitions import Definition, PolicyIds, define
from .model import ServedModel
from .similarity import load_similarities


@dataclass
class Process:
    """The config in force in a process, and the model that it serves by it.

    Attributes:
        loaded: the config.
        artifacts: those that its policies use, by their names in the config.
        rejections: requests that a scheduler refused, by reason.
        served: the model of a scheduler, once it is loaded. The HTTP process has none.
        ids: policy ids of the definitions in force and in use.
    """

    loaded: LoadedConfig
    artifacts: Mapping[str, SimilarityArtifact] = field(default_factory=dict)
    rejections: Counter[str] = field(default_factory=Counter)
    served: ServedModel | None = None

    def __post_init__(self) -> None:
        self.config = self.loaded.config
        self.ids = PolicyIds(define(self.loaded, self.artifacts))

    @property
    def model(self) -> ServedModel:
        """Raises `EngineError` before one is loaded."""
        if self.served is None:
            raise EngineError("the routing of this process was never attached to a model")
        return self.served

    def adopt(
        self,
        loaded: LoadedConfig,
        artifacts: Mapping[str, SimilarityArtifact],
        table: Sequence[Definition] | None = None,
    ) -> None:
        """Put a reloaded config into force for requests that come from now on.

        Args:
            table: definitions by policy id that the layers' tables were made of.
        """
        definitions = define(loaded, artifacts)
        self.ids.adopt(table or self.ids.with_config(definitions), definitions)
        self.loaded, self.config, self.artifacts = loaded, loaded.config, artifacts


def digests(loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact]) -> list[str]:
    """What decides about the routing, to be compared between ranks."""
    return [loaded.sha256, *(artifact.sha256 for artifact in artifacts.values())]


_current: Process | None = None


def start(loaded: LoadedConfig) -> Process:
    """Begin to route in this process. Raises as `load_similarities` does."""
    global _current
    _current = Process(loaded, used_artifacts(loaded))
    return _current


def used_artifacts(loaded: LoadedConfig) -> dict[str, SimilarityArtifact]:
    """Read all similarity artifacts; those that policies use. Raises as `load_similarities`."""
    used = {loaded.config.artifact_of(name) for name in loaded.config.names}
    artifacts = load_similarities(loaded)
    return {name: artifacts[name] for name in artifacts if name in used}


def current() -> Process:
    """What this process knows. Hooks are installed after `start`, so that it exists for them."""
    if _current is None:
        raise EngineError("the routing of this process was never started")
    return _current
