"""Named policies compiled to small tensors, so that one pass serves any mix of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PolicyError
from .base import Policy, Schedule
from .vanilla import Vanilla

ARTIFACT = "artifact"
"""Parameter that says which similarity matrix a row uses."""


@dataclass(frozen=True)
class PolicyTable:
    """What every policy does on one layer, for every number of live rows.

    Attributes:
        kinds: the policy classes that occur; index 0 is `Vanilla`.
        starts: int64 ``[num_steps - 1]``, ascending: column ``i`` of the tables holds from
            ``starts[i - 1]`` live rows on, column 0 below the first start.
        kind: int64 ``[num_policies, num_steps]``, index into `kinds`.
        parameters: name -> float32 or int64 ``[num_policies, num_steps]``.
        similarity: float32 ``[num_artifacts, num_experts, num_experts]``, possibly 0 artifacts.
    """

    kinds: tuple[type[Policy], ...]
    starts: Tensor
    kind: Tensor
    parameters: Mapping[str, Tensor]
    similarity: Tensor


def build_table(
    policies: Sequence[Policy],
    *,
    layer: int,
    top_k: int,
    num_experts: int,
    similarity: Mapping[str, Tensor] | None = None,
    artifacts: Sequence[str | None] | None = None,
    device: torch.device | str = "cpu",
) -> PolicyTable:
    """Compile `policies` for one layer; a row's policy id is an index into them.

    Args:
        similarity: artifact name -> ``[num_experts, num_experts]`` matrix of this layer.
        artifacts: for each policy the artifact that it uses, or None.

    Raises:
        PolicyError: a policy does not fit the router, or names an artifact that is not given.
    """
    similarity = similarity or {}
    artifacts = artifacts or [None] * len(policies)
    for policy, artifact in zip(policies, artifacts, strict=True):
        _check(policy, artifact, similarity, top_k, num_experts)
    changes = sorted({start for policy in policies for start in starts(policy)})
    steps = [0, *changes]  # one number of live rows for each column
    others: dict[type[Policy], None] = dict.fromkeys(map(type, policies))
    others.pop(Vanilla, None)
    kinds: tuple[type[Policy], ...] = (Vanilla, *others)

    kind = torch.zeros(len(policies), len(steps), dtype=torch.int64)
    for row, policy in enumerate(policies):
        for column, n in enumerate(steps):
            if policy.engage.covers(layer, n) and not policy.is_vanilla(layer, n, top_k):
                kind[row, column] = kinds.index(type(policy))
    parameters = _parameters(policies, layer, steps)
    names = list(similarity)
    parameters[ARTIFACT] = torch.tensor(
        [[names.index(a) if a else 0] * len(steps) for a in artifacts], dtype=torch.int64
    )
    matrices = [similarity[name].float() for name in names]
    return PolicyTable(
        kinds=kinds,
        starts=torch.tensor(changes, dtype=torch.int64, device=device),
        kind=kind.to(device),
        parameters={name: values.to(device) for name, values in parameters.items()},
        similarity=(
            torch.stack(matrices) if matrices else torch.zeros(0, num_experts, num_experts)
        ).to(device),
    )


def _check(
    policy: Policy,
    artifact: str | None,
    similarity: Mapping[str, Tensor],
    top_k: int,
    num_experts: int,
) -> None:
    problems = policy.check(top_k, num_experts)
    if ARTIFACT in policy.parameters():
        problems.append(f"parameter name {ARTIFACT!r} is reserved")
    if policy.uses_similarity and artifact not in similarity:
        known = ", ".join(similarity) or "none"
        problems.append(f"similarity: no artifact {artifact!r} for this layer; known: {known}")
    if problems:
        raise PolicyError("; ".join(problems))


def starts(policy: Policy) -> set[int]:
    """Numbers of live rows from which `policy` behaves differently."""
    found = {policy.engage.min_rows}
    if policy.engage.max_rows is not None:
        found.add(policy.engage.max_rows + 1)
    for _, schedule in policy.schedules():
        found.update(schedule.rows)
    return found


def _parameters(policies: Sequence[Policy], layer: int, steps: Sequence[int]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for policy in policies for name in policy.parameters())
    tensors = {}
    for name in names:
        rows = [
            [_value(policy.parameters().get(name, 0), layer, n) for n in steps]
            for policy in policies
        ]
        is_float = any(isinstance(value, float) for row in rows for value in row)
        tensors[name] = torch.tensor(rows, dtype=torch.float32 if is_float else torch.int64)
    return tensors


def _value(value: Schedule[int] | Schedule[float] | float, layer: int, num_rows: int) -> float:
    return value.value(layer, num_rows) if isinstance(value, Schedule) else value
