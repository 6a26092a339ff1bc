"""`xshare`: XShare (arXiv 2602.07265), a greedy set of experts for the whole batch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import exceeds_top_k
from .budget import Filled
from .rule import Place, Rule
from .schedule import MAX_ROWS, Count


class XShare(Filled):
    """Each token's best `k0` experts, and the `max_active` that the batch's gates weigh most.

    The batch's experts are chosen greedily by the sum of the tokens' normalised gates; tokens then
    take their best top-k among them.
    """

    kind: Literal["xshare"] = "xshare"
    max_active: Count
    """Experts that join by demand, per layer and step. Those that `k0` requires come on top."""
    k0: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 1
    """Experts that each token is guaranteed."""

    def rule(self, place: Place) -> Rule:
        max_active = self.max_active.value(place.layer, place.live_rows)
        return Rule(k0=self.k0, max_active=max_active, exponent=1, **self.weights())

    def check(self, top_k: int, num_experts: int) -> list[str]:
        return super().check(top_k, num_experts) + exceeds_top_k("k0", self.k0, top_k)
