"""Named policies as small tensors, which the reference and the kernels read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PolicyError
from .base import Policy
from .rule import UNLIMITED, Place, Rule
from .schedule import MAX_ROWS
from .torch_policy import TorchPolicy

Number = int | float


class Flag(IntFlag):
    """Bits of the first word: ``Flag`` in ``csrc/include/moe_routing/call.h``."""

    REROUTES = 1
    """Without it a row is vanilla, and no other word counts."""
    MOVES = 2
    """Slots move to stand-ins; else the row takes experts in its own order."""
    COMPENSATES = 4
    """The rule gives a compensation; else the model's weights count."""
    HAS_COEFFICIENTS = 8
    """A moved slot is weighed by the matrix that follows the row's artifact."""


WORDS = (
    "flags",
    "k0",
    "p",
    "k_max",
    "max_rank",
    "threshold",
    "artifact",
    "start",
    "max_active",
    "exponent",
    "mapped_share",
    "compensation",
)
"""The 32-bit words of one policy at one step: ``Policy`` in ``csrc/include/moe_routing/call.h``."""

FLOATS = frozenset(("p", "threshold", "mapped_share", "compensation"))
_START = WORDS.index("start")


@dataclass(frozen=True)
class PolicyTable:
    """What every policy does on one layer, for every number of live rows.

    Kernels read these tensors at every call, so a reload only has to rewrite their contents, also
    where captured graphs hold their addresses.

    Attributes:
        words: int32 ``[num_policies, num_steps, len(WORDS)]``; floats by their bits. Step ``i``
            holds from its start on, in live rows; step 0 starts at 0.
        similarity: float32 ``[num_matrices, num_experts, num_experts]``, possibly 0 matrices. The
            coefficients of an artifact that has some follow its similarities.
        layer: the model's layer number.
        torch_policies: those that the kernels cannot run, by policy id.
    """

    words: Tensor
    similarity: Tensor
    layer: int = 0
    torch_policies: Mapping[int, TorchPolicy] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """``[num_policies, num_steps]``, the word `name` of every policy and step."""
        words = self.words[..., WORDS.index(name)]
        return words.view(torch.float32) if name in FLOATS else words

    @property
    def capacity(self) -> Capacity:
        num_policies, num_steps, _ = self.words.shape
        return Capacity(num_policies, num_steps, self.similarity.shape[0])

    def to(self, device: torch.device | str) -> PolicyTable:
        return replace(
            self, words=self.words.to(device), similarity=self.similarity.to(device).contiguous()
        )

    def rewrite(self, other: PolicyTable) -> None:
        """Take over the contents of a table with the same capacity."""
        self.words.copy_(other.words)
        self.similarity.copy_(other.similarity)


class Capacity(NamedTuple):
    """How much a table holds."""

    policies: int
    steps: int
    matrices: int


def build_table(
    policies: Sequence[Policy],
    *,
    layer: int,
    top_k: int,
    num_experts: int,
    similarity: Mapping[str, Tensor] | None = None,
    coefficients: Mapping[str, Tensor] | None = None,
    artifacts: Sequence[str | None] | None = None,
    device: torch.device | str = "cpu",
) -> PolicyTable:
    """Lay `policies` out for one layer on the host; then the table goes to `device`.

    A row's policy id is an index into them.

    Args:
        similarity: artifact name -> float ``[num_experts, num_experts]`` matrix of this layer.
        coefficients: artifact name -> matrix of the same shape, for artifacts that have one.
        artifacts: artifact name per policy; None for policies that use none.

    Raises:
        PolicyError: a policy does not fit the layer, lacks its artifact, or gives a wrong rule.
    """
    similarity, coefficients = similarity or {}, coefficients or {}
    artifacts = artifacts or [None] * len(policies)
    matrices, places = _stack(similarity, coefficients)
    starts = [0, *sorted({start for policy in policies for start in policy.starts()})]
    words = torch.zeros(len(policies), len(starts), len(WORDS), dtype=torch.int32)
    floats = words.view(torch.float32)
    for row, (policy, artifact) in enumerate(zip(policies, artifacts, strict=True)):
        _check(policy, artifact, similarity, layer, top_k, num_experts)
        for step, start in enumerate(starts):
            rule = policy.in_force(Place(layer, start, top_k, num_experts))
            if rule.is_vanilla(top_k):
                continue
            flags = _flags(rule, artifact in coefficients)
            numbers = _numbers(rule, flags, places.get(artifact or "", 0))
            for name, number in numbers.items():
                to = floats if name in FLOATS else words
                to[row, step, WORDS.index(name)] = number
    words[..., _START] = torch.tensor(starts, dtype=torch.int32)
    return PolicyTable(
        words=words,
        similarity=torch.stack(matrices) if matrices else torch.zeros(0, num_experts, num_experts),
        layer=layer,
        torch_policies={i: p for i, p in enumerate(policies) if isinstance(p, TorchPolicy)},
    ).to(device)


def _stack(
    similarity: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, int]]:
    """All matrices, float32, and where each artifact's are."""
    matrices: list[Tensor] = []
    places = {}
    for name, matrix in similarity.items():
        places[name] = len(matrices)
        matrices.append(matrix.float())
        if name in coefficients:
            matrices.append(coefficients[name].float())
    return matrices, places


def _flags(rule: Rule, has_coefficients: bool) -> Flag:
    flags = Flag.REROUTES
    if rule.moves:
        flags |= Flag.MOVES
    if rule.compensation is not None:
        flags |= Flag.COMPENSATES
    elif rule.moves and has_coefficients:
        flags |= Flag.HAS_COEFFICIENTS
    return flags


def _numbers(rule: Rule, flags: Flag, artifact: int) -> dict[str, Number]:
    lowest = torch.finfo(torch.float32).min  # a threshold stays finite in 32 bits
    return {
        **rule.model_dump(exclude_none=True),
        "threshold": min(max(rule.threshold or 0.0, lowest), -lowest),
        "flags": int(flags),
        "artifact": artifact,
        "compensation": 1.0 if rule.compensation is None else rule.compensation,
    }


def _check(
    policy: Policy,
    artifact: str | None,
    similarity: Mapping[str, Tensor],
    layer: int,
    top_k: int,
    num_experts: int,
) -> None:
    problems = policy.check(top_k, num_experts)
    if policy.uses_similarity and artifact not in similarity:
        known = ", ".join(similarity) or "none"
        problems.append(f"similarity: no artifact {artifact!r} for this layer; known: {known}")
    if not problems:
        problems += islice(rule_problems(policy, layer, top_k, num_experts), 1)
    if problems:
        raise PolicyError("; ".join(problems))


def rule_problems(policy: Policy, layer: int, top_k: int, num_experts: int) -> Iterator[str]:
    """What is wrong with the rule that `policy` gives on a layer, whatever its parameters.

    A rule that changes between two of its `starts` would be served as it began.
    """
    try:
        starts = sorted({1, *policy.starts()})
    except PolicyError as error:
        yield str(error)
        return
    for start, end in pairwise([*starts, MAX_ROWS + 1]):
        first, *others = (Place(layer, n, top_k, num_experts) for n in _probes(start, end - 1))
        try:
            rule = policy.rule_at(first)
            changed = [place for place in others if policy.rule_at(place) != rule]
        except PolicyError as error:
            yield str(error)
            continue
        for place in changed[:1]:
            yield (
                f"kind: {policy.kind} has another rule at {place.live_rows} live rows than at "
                f"{first.live_rows}: add every number of rows from which on it changes to `steps`"
            )
        if rule.uses_similarity and not policy.uses_similarity:
            yield (
                f"kind: {policy.kind} has a rule that uses similarity (threshold or mapped_share), "
                "but its uses_similarity is False, so that no artifact is loaded for it"
            )


def _probes(first: int, last: int) -> Iterator[int]:
    """Numbers of rows from `first` to `last`: the ends and each doubling, for a reload waits."""
    yield first
    doublings = (2**i for i in range(MAX_ROWS.bit_length()))
    yield from sorted(n for n in {first + 1, *doublings, last} if first < n <= last)


def with_capacity(table: PolicyTable, capacity: Capacity) -> PolicyTable:
    """Pad `table`: further policies are vanilla, further steps are never reached.

    Raises:
        PolicyError: the table needs more than `capacity`; the message says of what.
    """
    spare = Capacity(*(has - needed for has, needed in zip(capacity, table.capacity, strict=True)))
    for what, has, left in zip(Capacity._fields, capacity, spare, strict=True):
        if left < 0:
            raise PolicyError(f"needs room for {has - left} {what}, there is room for {has}")
    never = table.words[:, -1:].clone()
    never[..., _START] = UNLIMITED
    words = torch.cat([table.words, never.expand(-1, spare.steps, -1)], dim=1)
    words = nn.functional.pad(words, (0, 0, 0, 0, 0, spare.policies))
    words[..., _START] = words[:1, :, _START]  # the same for all policies
    similarity = nn.functional.pad(table.similarity, (0, 0, 0, 0, 0, spare.matrices))
    return replace(table, words=words.contiguous(), similarity=similarity.contiguous())
