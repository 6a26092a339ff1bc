"""`budget`: a bound on the active experts of a call, spent where the tokens' weights are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import exceeds_top_k
from .rule import Place, Rule
from .schedule import MAX_ROWS, Count
from .weights import Mapped

CROWD = 16
"""Live rows from which on a budget of less than twice top_k was measured to be ruinous."""

EXPONENTS: dict[str, Literal[1, 2]] = {"squared_gate": 2, "gate": 1}


class Filled(Mapped):
    """Base of kinds that bound the active experts of a call."""

    max_active: Count
    """Most active experts per layer and step. What rows of other policies, or `k0`, require comes
    on top."""

    def check(self, top_k: int, num_experts: int) -> list[str]:
        worst = max(self.max_active.values())
        if worst > num_experts:
            return [f"max_active: {worst} exceeds the model's {num_experts} experts"]
        return []

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


class Budget(Filled):
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
    k0: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 0
    """Experts that each token is guaranteed. Above 0 the bound is no longer hard."""
    utility: Literal["squared_gate", "gate"] = "squared_gate"
    """What an expert is worth to a token, of its gate normalised over the token's top-k."""

    def rule(self, place: Place) -> Rule:
        return Rule(
            k0=self.k0,
            max_active=self.max_active.value(place.layer, place.live_rows),
            exponent=EXPONENTS[self.utility],
            **self.weights(),
        )

    def check(self, top_k: int, num_experts: int) -> list[str]:
        return super().check(top_k, num_experts) + exceeds_top_k("k0", self.k0, top_k)
