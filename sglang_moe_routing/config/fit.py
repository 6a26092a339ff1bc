"""Whether a config's policies fit a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import PolicyError
from ..policies import Policy, Sizes, doubts, problems
from .loader import LoadedConfig


def check_policies(loaded: LoadedConfig, model: Mapping[int, Sizes]) -> list[str]:
    """Hold every policy of a config to a model.

    Args:
        model: its MoE layers by layer id.

    Returns:
        What can be served but is hardly meant.

    Raises:
        PolicyError: policies do not fit; all of them are listed.
    """
    wrong = _by_policy(problems, loaded, model)
    if wrong:
        raise PolicyError(f"{loaded.path}: " + "; ".join(wrong))
    return _by_policy(doubts, loaded, model)


def _by_policy(
    find: Callable[[Policy, Mapping[int, Sizes]], list[str]],
    loaded: LoadedConfig,
    model: Mapping[int, Sizes],
) -> list[str]:
    named = zip(loaded.config.names, loaded.config.definitions, strict=True)
    return [f"policies.{name}.{found}" for name, policy in named for found in find(policy, model)]
