from typing import Annotated, Literal

from pydantic import Field

from sglang_moe_routing.policies import Mapped, Place, Rule

MOST = 256  # live rows from which on the budget stays as it is


class Doubling(Mapped):
    """A budget of active experts that grows with every doubling of the live rows."""

    kind: Literal["doubling"] = "doubling"
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the layer's experts that each doubling adds to the top_k of a lone row."""

    def rule(self, place: Place) -> Rule:
        doublings = min(place.live_rows, MOST).bit_length() - 1
        budget = place.top_k + round(doublings * self.share * place.num_experts)
        return Rule(k0=0, max_active=min(budget, place.num_experts), **self.weights())

    def steps(self) -> set[int]:
        return {2**i for i in range(1, MOST.bit_length())}
