"""The registry of policy kinds. A plain object: make one, fill it, throw it away."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from ..errors import PolicyError
from .base import Policy
from .budget import Budget
from .lynx import Lynx
from .oea import OEA
from .sere import SERE
from .topk import TopK
from .vanilla import Vanilla
from .xshare import XShare

ENTRY_POINT_GROUP = "sglang_moe_routing.policies"


class PolicyRegistry:
    """Policy kinds by name."""

    def __init__(self) -> None:
        self._kinds: dict[str, type[Policy]] = {}

    def register(self, policy: type[Policy]) -> type[Policy]:
        """Add a kind; usable as a decorator.

        Raises:
            PolicyError: `policy` is not a `Policy` class, declares no kind, or the kind is taken.
        """
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise PolicyError(f"{policy!r} is not a subclass of sglang_moe_routing.Policy")
        kind = policy.model_fields["kind"].default
        if not isinstance(kind, str) or not kind:
            raise PolicyError(
                f"{policy.__qualname__} declares no kind; add: kind: Literal['name'] = 'name'"
            )
        if kind in self._kinds:
            taken = self._kinds[kind]
            raise PolicyError(
                f"policy kind {kind!r} of {policy.__module__}.{policy.__qualname__} is already "
                f"registered by {taken.__module__}.{taken.__qualname__}"
            )
        self._kinds[kind] = policy
        return policy

    def __getitem__(self, kind: str) -> type[Policy]:
        try:
            return self._kinds[kind]
        except KeyError:
            known = ", ".join(self)
            raise PolicyError(f"policy kind {kind!r} is not registered; known: {known}") from None

    def __contains__(self, kind: object) -> bool:
        return kind in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._kinds))

    def classes(self) -> list[type[Policy]]:
        """The registered classes, by kind."""
        return [self._kinds[kind] for kind in self]


BUILTIN: tuple[type[Policy], ...] = (Vanilla, TopK, OEA, SERE, Budget, XShare, Lynx)


def builtin_registry() -> PolicyRegistry:
    """A new registry with the built-in kinds."""
    registry = PolicyRegistry()
    for policy in BUILTIN:
        registry.register(policy)
    return registry


def installed_registry() -> PolicyRegistry:
    """A new registry with the built-in kinds and those of installed third-party packages.

    Raises:
        PolicyError: an entry point of the group cannot be loaded or registered.
    """
    registry = builtin_registry()
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        registry.register(_load(entry_point))
    return registry


def _load(entry_point: EntryPoint) -> type[Policy]:
    try:
        return entry_point.load()  # type: ignore[no-any-return]  # register() checks it
    except Exception as error:
        raise PolicyError(
            f"policy entry point {entry_point.name!r} ({entry_point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
