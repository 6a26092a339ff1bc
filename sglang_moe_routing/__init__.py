"""Per-request expert re-routing (SERE, OEA and others) for Mixture-of-Experts models on SGLang.

Importing this package needs neither sglang nor a GPU.
"""

from importlib.metadata import PackageNotFoundError, version

from .artifacts import SimilarityArtifact, load_artifact, save_artifact
from .errors import (
    ArtifactError,
    ConfigError,
    EngineError,
    PolicyError,
    RoutingError,
    RoutingRequestError,
)
from .policies import Policy, PolicyRegistry

try:
    __version__ = version("sglang-moe-routing")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ArtifactError",
    "ConfigError",
    "EngineError",
    "Policy",
    "PolicyError",
    "PolicyRegistry",
    "RoutingError",
    "RoutingRequestError",
    "SimilarityArtifact",
    "__version__",
    "load_artifact",
    "save_artifact",
]
