"""Hold recorded MoE calls to what their policies promise, in plain Python.

Shares no code with the implementation that serves; used by the demo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..policies import FREE, OEA, SERE, Policy, TopK, Vanilla
from ..policies.scoring import FAINTEST

WEIGHT_TOLERANCE = 1e-5  # weights are float32 sums of at most 16 terms


@dataclass(frozen=True)
class Verdict:
    """What the recorded calls show.

    Attributes:
        num_calls, num_rows: how much was checked.
        vanilla_identical: every vanilla row kept the engine's ids and weights bit for bit.
        repeated_experts: slots of live rows that name an expert which an earlier slot of the row
            names; slots of weight 0 that repeat the row's first are free and not counted.
        violations: rows that broke their policy, in words; empty if none did.
    """

    num_calls: int
    num_rows: int
    num_vanilla_rows: int
    vanilla_identical: bool
    repeated_experts: int
    violations: Sequence[str]

    @property
    def ok(self) -> bool:
        is_kept = self.vanilla_identical and not self.repeated_experts
        return is_kept and not self.violations and self.num_rows > 0


def verify_calls(
    calls: Iterable[Mapping[str, Any]],
    policies: Mapping[str, Policy],
    similarity: Mapping[int, Sequence[Sequence[float]]],
) -> Verdict:
    """Check every row of every call.

    Args:
        calls: from `read_records`, of a softmax router without groups.
        policies: definition of every policy name that occurs.
        similarity: layer id -> matrix that the `sere` policies use.
    """
    num_calls = num_rows = num_vanilla = repeated = 0
    identical = True
    violations: list[str] = []
    for call in calls:
        num_calls += 1
        rows = [_Row(call, index) for index, name in enumerate(call["rows"]) if name is not None]
        union = {e for row in rows for e in row.base[: _num_required(policies[row.policy], row)]}
        for row in rows:
            num_rows += 1
            repeated += len(row.held) - len(row.experts)
            policy = policies[row.policy]
            if isinstance(policy, Vanilla):
                num_vanilla += 1
                identical &= row.is_untouched
                continue
            problem = _problem(policy, row, union, similarity.get(call["layer"], ()))
            if problem:
                violations.append(f"layer {call['layer']}, {row.policy}: {problem}")
    return Verdict(num_calls, num_rows, num_vanilla, identical, repeated, violations)


class _Row:
    """One row of a recorded call, its base experts in rank order."""

    def __init__(self, call: Mapping[str, Any], index: int) -> None:
        self.policy: str = call["rows"][index]
        self.logits: list[float] = call["router_logits"][index]
        self.slots: list[int] = call["base_ids"][index]
        self.slot_weights: list[float] = call["base_weights"][index]
        self.ids: list[int] = call["final_ids"][index]
        self.weights: list[float] = call["final_weights"][index]
        self.base = sorted(self.slots, key=self.preference)
        self.num_live = sum(name is not None for name in call["rows"])
        self.layer: int = call["layer"]

    @property
    def held(self) -> list[tuple[int, float]]:
        """Expert and weight of every slot that is not free."""
        first, *others = zip(self.ids, self.weights, strict=True)
        return [first, *(s for s in others if s[0] != FREE and s != (self.ids[0], 0.0))]

    @property
    def experts(self) -> set[int]:
        return {expert for expert, _ in self.held}

    def has_weight(self, expert: int) -> bool:
        """Whether a softmax router gives the expert any weight."""
        return self.logits[expert] - max(self.logits) >= FAINTEST

    def preference(self, expert: int) -> tuple[bool, float, int]:
        """Sort key: the router's own choice first, then falling logits, then lower ids."""
        return (expert not in self.slots, -self.logits[expert], expert)

    @property
    def is_untouched(self) -> bool:
        return self.ids == self.slots and self.weights == self.slot_weights


def _num_required(policy: Policy, row: _Row) -> int:
    if not policy.engage.covers(row.layer, row.num_live):
        return len(row.base)
    if isinstance(policy, OEA | TopK):
        return policy.k0.value(row.layer, row.num_live)
    if isinstance(policy, SERE):
        return policy.num_primary.value(row.layer, row.num_live)
    if isinstance(policy, Vanilla):
        return len(row.base)
    raise ValueError(f"policies of kind {policy.kind} cannot be verified")


def _problem(
    policy: Policy, row: _Row, union: set[int], similarity: Sequence[Sequence[float]]
) -> str:
    required = row.base[: _num_required(policy, row)]
    if isinstance(policy, SERE):
        return _sere_problem(policy, row, set(required), union, similarity)
    if isinstance(policy, OEA) and (policy.p, policy.k_max, policy.max_rank) != (1.0, None, None):
        raise ValueError("only the simplified form of oea (k0 alone) can be verified")
    allowed = set(required) if isinstance(policy, TopK) else union
    wanted = sorted(allowed, key=row.preference)[: len(row.slots)]
    if not any(map(row.has_weight, wanted)):
        return "" if row.is_untouched else "changed, although no expert that it may use has weight"
    if row.experts != set(wanted):
        return f"runs {sorted(row.experts)}, expected {sorted(wanted)}"
    if not math.isclose(sum(row.weights), sum(row.slot_weights), abs_tol=WEIGHT_TOLERANCE):
        return f"weights sum to {sum(row.weights)}, expected {sum(row.slot_weights)}"
    return ""


def _sere_problem(
    policy: SERE,
    row: _Row,
    required: set[int],
    union: set[int],
    similarity: Sequence[Sequence[float]],
) -> str:
    threshold = policy.threshold.value(row.layer, row.num_live)
    expected: dict[int, float] = {}
    for before, weight in zip(row.slots, row.slot_weights, strict=True):
        after = before
        if before not in required and before not in union:
            nearest = max(sorted(union), key=similarity[before].__getitem__)
            if similarity[before][nearest] >= threshold:
                after = nearest
        expected[after] = expected.get(after, 0.0) + weight
    if row.experts != set(expected):
        return f"runs {sorted(row.experts)}, expected {sorted(expected)}"
    for expert, weight in row.held:
        if not math.isclose(weight, expected[expert], abs_tol=WEIGHT_TOLERANCE):
            return f"expert {expert} weighs {weight}, expected {expected[expert]}"
    return ""
