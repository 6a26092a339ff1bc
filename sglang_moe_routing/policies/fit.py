"""How a policy fits a model: what is wrong with it there, and what is hardly meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from .base import Policy
from .rule import Place
from .schedule import format_layers, runs
from .table import rule_problems
from .vanilla import Vanilla


@dataclass(frozen=True)
class Sizes:
    """One MoE layer: routed experts per token, and routed experts."""

    top_k: int
    num_experts: int


def problems(policy: Policy, model: Mapping[int, Sizes]) -> list[str]:
    """What keeps `policy` from being served with `model`, MoE layers by layer id."""
    found = [p for s in set(model.values()) for p in policy.check(s.top_k, s.num_experts)]
    if not found:
        found += islice(_rule_problems(policy, model), 1)  # one wrong rule is wrong in many places
    for where, named in _named_layers(policy):
        found += [f"{where}: {problem}" for problem in _not_routed(named, model)]
    return list(dict.fromkeys(found))


def doubts(policy: Policy, model: Mapping[int, Sizes]) -> list[str]:
    """What `policy` can be served with on `model` but is hardly meant. It has no `problems`."""
    if isinstance(policy, Vanilla):
        return []
    if not _acts(policy, model):
        top_k = ", ".join(str(k) for k in sorted({sizes.top_k for sizes in model.values()}))
        kind = f"kind: {policy.kind} has no effect here"
        return [f"{kind}: every token keeps all its {top_k} experts, as under vanilla"]
    found = [d for s in set(model.values()) for d in policy.doubts(s.top_k, s.num_experts)]
    return list(dict.fromkeys(found))


def _rule_problems(policy: Policy, model: Mapping[int, Sizes]) -> Iterator[str]:
    for layer, sizes in model.items():
        yield from rule_problems(policy, layer, sizes.top_k, sizes.num_experts)


def _acts(policy: Policy, model: Mapping[int, Sizes]) -> bool:
    return any(
        not policy.is_vanilla(Place(layer, n, sizes.top_k, sizes.num_experts))
        for layer, sizes in model.items()
        for n in policy.starts()
    )


def _named_layers(policy: Policy) -> Iterator[tuple[str, Collection[int]]]:
    if policy.engage.layers is not None:
        yield "engage.layers", policy.engage.layers
    for name, schedule in policy.schedules():
        for layers in schedule.layers:
            yield f"{name}.layers.{format_layers(layers)}", layers


def _not_routed(named: Collection[int], model: Collection[int]) -> Iterator[str]:
    """Runs of layers without effect. A run may cover dense layers, but not go beyond the model."""
    last = max(model)
    for run in runs(named):
        missing = [layer for layer in run if layer > last]
        if not missing and not set(run) & set(model):
            missing = list(run)
        if missing:
            yield (
                f"the model has no MoE layer at {format_layers(missing)}; "
                f"its MoE layers are {format_layers(model)}"
            )
