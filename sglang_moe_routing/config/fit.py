"""Whether a config's policies fit a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import PolicyError
from ..policies import Policy, Sizes, TorchPolicy, doubts, problems
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


def check_torch_policies(loaded: LoadedConfig) -> list[str]:
    """Hold a config to compiled kernels, which policies that are written in torch keep idle.

    Returns:
        What its policies cost, where it allows them.

    Raises:
        PolicyError: it has such policies and does not allow them; all of them are listed.
    """
    named = zip(loaded.config.names, loaded.config.definitions, strict=True)
    found = [f"policies.{name}.kind: {p.kind}" for name, p in named if isinstance(p, TorchPolicy)]
    if not found:
        return []
    price = (
        f"{', '.join(found)}: written in torch. While such a policy is listed, rows of every "
        "policy are computed by the torch reference, many times slower than by the compiled kernels"
    )
    if loaded.config.torch_policies == "allow":
        return [price]
    raise PolicyError(
        f"{loaded.path}: {price}. Let it give a Rule, list it in another server's config, or "
        "accept the price with a top-level torch_policies: allow"
    )


def _by_policy(
    find: Callable[[Policy, Mapping[int, Sizes]], list[str]],
    loaded: LoadedConfig,
    model: Mapping[int, Sizes],
) -> list[str]:
    named = zip(loaded.config.names, loaded.config.definitions, strict=True)
    return [f"policies.{name}.{found}" for name, policy in named for found in find(policy, model)]
