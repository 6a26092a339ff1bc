"""Named policies compiled to small tensors, so that one pass serves any mix of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PolicyError
from .base import Policy, Schedule
from .vanilla import Vanilla


@dataclass(frozen=True)
class PolicyTable:
    """What every policy does on one layer, for every number of live rows.

    Attributes:
        kinds: the policy classes that occur; index 0 is `Vanilla`.
        kind: int64 ``[num_policies, num_steps]``, index into `kinds`. Column ``n`` holds for
            ``n`` live rows, the last column also for more.
        parameters: name -> float32 or int64 ``[num_policies, num_steps]``.
        similarity: float32 ``[num_artifacts, num_experts, num_experts]``, possibly 0 artifacts.
    """

    kinds: tuple[type[Policy], ...]
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
    num_steps = 2 + max(map(_last_step, policies), default=0)
    others: dict[type[Policy], None] = dict.fromkeys(map(type, policies))
    others.pop(Vanilla, None)
    kinds: tuple[type[Policy], ...] = (Vanilla, *others)

    kind = torch.zeros(len(policies), num_steps, dtype=torch.int64)
    for row, policy in enumerate(policies):
        for n in range(num_steps):
            if policy.engage.covers(layer, n) and not policy.is_vanilla(layer, n, top_k):
                kind[row, n] = kinds.index(type(policy))
    parameters = _parameters(policies, layer, num_steps)
    names = list(similarity)
    parameters["artifact"] = torch.tensor(
        [[names.index(a) if a else 0] * num_steps for a in artifacts], dtype=torch.int64
    )
    matrices = [similarity[name].float() for name in names]
    return PolicyTable(
        kinds=kinds,
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
    if policy.uses_similarity and artifact not in similarity:
        known = ", ".join(similarity) or "none"
        problems.append(f"similarity: no artifact {artifact!r} for this layer; known: {known}")
    if problems:
        raise PolicyError("; ".join(problems))


def _last_step(policy: Policy) -> int:
    steps = [policy.engage.min_rows, policy.engage.max_rows or 0]
    for value in policy.parameters().values():
        if isinstance(value, Schedule):
            steps.extend(value.rows)
    return max(steps)


def _parameters(policies: Sequence[Policy], layer: int, num_steps: int) -> dict[str, Tensor]:
    names = dict.fromkeys(name for policy in policies for name in policy.parameters())
    tensors = {}
    for name in names:
        rows = [
            [_value(policy.parameters().get(name, 0), layer, n) for n in range(num_steps)]
            for policy in policies
        ]
        is_float = any(isinstance(value, float) for row in rows for value in row)
        tensors[name] = torch.tensor(rows, dtype=torch.float32 if is_float else torch.int64)
    return tensors


def _value(value: Schedule[int] | Schedule[float] | float, layer: int, num_rows: int) -> float:
    return value.value(layer, num_rows) if isinstance(value, Schedule) else value
