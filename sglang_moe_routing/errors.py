"""The exceptions of this package. Imports nothing of ours."""

from __future__ import annotations

import reprlib


class RoutingError(Exception):
    """Base of every error that this package raises on purpose."""


class PolicyError(RoutingError, ValueError):
    """A policy definition, registration or parameter is wrong."""


class ConfigError(RoutingError, ValueError):
    """A routing config cannot be used. The message names file, key path, value and remedy."""


class ArtifactError(RoutingError, ValueError):
    """A similarity artifact is unreadable or does not fit the model."""


class CheckpointError(RoutingError, ValueError):
    """A model's checkpoint is missing, damaged, or of a kind that cannot be read."""


class CalibrationError(RoutingError, ValueError):
    """Similarity matrices cannot be computed from this model or this text."""


class TextError(RoutingError, ValueError):
    """A text or its tokenizer cannot be read, or the text is too short."""


class RoutingRequestError(RoutingError, ValueError):
    """A client asked for a policy that it cannot have.

    Attributes:
        reason: one of a fixed set of words, for metrics.
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, *, reason: str, status: int = 400) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class ReloadError(RoutingError, ValueError):
    """A new routing config cannot take the place of the one in force, which stays."""


class EngineError(RoutingError, RuntimeError):
    """SGLang, the model or the server flags are not what this package was written for."""


class KernelError(RoutingError, RuntimeError):
    """The compiled kernels cannot be built, loaded or used as asked."""


class BenchError(RoutingError, ValueError):
    """A measurement cannot be made as asked, or its results are wrong."""


class CheckError(RoutingError, AssertionError):
    """A policy or a recorded call is not what it should be; see `sglang_moe_routing.testing`."""


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python converts no more than a few thousand digits
            return f"an integer of {value.bit_length()} bits"


def shorten(value: object) -> str:
    """``repr(value)`` for a message: a user's value may be of any size."""
    return _Shortener().repr(value)


_REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (
        ImportError,
        "a package is missing, damaged or of another version; reinstall the one that is named, or "
        "this one with its dependencies: pip install -e . in its checkout",
    ),
    (
        PermissionError,
        "let this user have access to it; libraries keep their caches below HOME, which can be set "
        "to a folder that the user may write to",
    ),
)


def describe(error: BaseException) -> str:
    """What to tell a user: a message of ours as it is, any other with its kind and a remedy."""
    if isinstance(error, RoutingError):
        return str(error)
    remedies = [f"; {remedy}" for kind, remedy in _REMEDIES if isinstance(error, kind)]
    return "".join((f"{type(error).__name__}: {error}", *remedies))
