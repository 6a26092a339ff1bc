"""`budget`: a bound on the active experts of a call, spent where the tokens' weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import MAX_ROWS, Count, Parameters, Rows, Schedule
from .mapping import Mapped

QUANTUM = 2.0**-16
"""Demand is summed in whole quanta: the sum does not depend on its order. 65,535 rows fit 32 bits.
"""

CROWD = 16
"""Live rows from which on a budget of less than twice top_k was measured to be ruinous."""


class Budget(Mapped):
    """The batch loads the `max_active` experts that its tokens weigh most, and no others.

    The experts that the budget rows of a call demand most, as many as the largest of their
    `max_active`, join the union of what rows of every policy require. Demand is the sum over budget
    rows of a utility of the expert's normalised gate, for the row's own top-k. Then every token
    takes its best top-k experts inside the union, weighed as the model does. A call whose choice
    fits the budget keeps its experts.

    The fill is the greedy set of XShare (arXiv 2602.07265) with squared gates: a token's lost
    output grows with the square of the weight it loses.
    """

    kind: Literal["budget"] = "budget"
    max_active: Count
    """Most active experts per layer and step. What rows of other policies, or `k0`, require comes
    on top."""
    k0: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 0
    """Experts that each token is guaranteed. Above 0 the bound is no longer hard."""
    utility: Literal["squared_gate", "gate"] = "squared_gate"
    """What an expert is worth to a token, of its gate normalised over the token's top-k."""

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        return {
            "max_active": self.max_active,
            "k0": self.k0,
            "exponent": 2 if self.utility == "squared_gate" else 1,
            **super().parameters(),
        }

    def is_vanilla(self, layer: int, num_rows: int, top_k: int) -> bool:
        return self.k0 >= top_k

    def check(self, top_k: int, num_experts: int) -> list[str]:
        problems = []
        worst = max(self.max_active.values())
        if worst > num_experts:
            problems.append(f"max_active: {worst} exceeds the model's {num_experts} experts")
        if self.k0 > top_k:
            problems.append(f"k0: {self.k0} exceeds the model's top_k of {top_k}")
        return problems

    def doubts(self, top_k: int, num_experts: int) -> list[str]:
        least = min(self.max_active.values_from(self.engage.min_rows))
        if least < top_k:
            return [
                f"max_active: {least} is below the model's top_k of {top_k}: every token loses "
                "experts, even a lone one, and all of a step share the same few"
            ]
        if min(self.max_active.values()) >= num_experts:
            return [f"max_active: {least} is all of the model's experts: this never acts"]
        if self.engage.last_row < CROWD:
            return []
        crowded = min(self.max_active.values_from(max(CROWD, self.engage.min_rows)))
        if crowded < 2 * top_k:
            return [
                f"max_active: {crowded} is close to the model's top_k of {top_k}: at {CROWD} live "
                "rows and more all tokens of a step share nearly the same experts, which costs "
                "much quality; measure it with `evaluate`, or raise max_active with the rows"
            ]
        return []

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.rank < parameters["k0"][:, None]

    @classmethod
    def fill(cls, rows: Rows, parameters: Parameters, selected: Tensor, union: Tensor) -> Tensor:
        if len(selected) == 0:
            return union
        demand = torch.where(selected[:, None], cls._demand(rows, parameters), 0).sum(dim=0)
        wanted = torch.where(selected, parameters["max_active"].long(), 0).amax()
        order = demand.argsort(descending=True, stable=True)  # ties to the lower id
        return union | ((demand > 0) & (order.argsort() < wanted))

    @classmethod
    def _demand(cls, rows: Rows, parameters: Parameters) -> Tensor:
        """int64 ``[num_tokens, num_experts]``, quanta; at least 1 for an expert with any gate."""
        base = rows.order[:, : rows.top_k]
        gates = rows.gates.gather(1, base)
        share = gates / gates.sum(dim=1, keepdim=True)
        utility = torch.where(parameters["exponent"][:, None] == 2, share * share, share)
        quanta = (utility.clamp(max=1) / QUANTUM + 0.5).nan_to_num(nan=0.0).long().clamp(min=1)
        quanta = torch.where(share > 0, quanta, 0)
        return torch.zeros_like(rows.rank).scatter_(1, base, quanta)

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        usable = (union | cls.required(rows, parameters, union)).gather(1, rows.order)
        kept = usable & (usable.cumsum(dim=1) <= rows.top_k)
        return cls.take(rows, parameters, kept.gather(1, rows.rank))
