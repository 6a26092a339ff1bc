"""`oea`: Opportunistic Expert Activation (arXiv 2511.02237, Algorithms 1 and 2)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .rule import Place, Rule, limit
from .schedule import Count, PositiveCount
from .weights import Mapped


class OEA(Mapped):
    """Keep each token's best `k0` experts, then let it use what the batch loads anyway.

    Baseline: the first ``min(k0, t)`` experts, ``t`` the fewest that hold a share `p` of the
    gate mass. Piggyback: experts of the batch union in the token's own preference order, up to
    rank `max_rank`, until it holds `k_max`. Weights are the model's over the chosen set.
    The paper's recommended form is `k0` alone.
    """

    kind: Literal["oea"] = "oea"
    k0: Count
    """Experts that each token is guaranteed."""
    p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the gate mass at which a token needs no further baseline expert; 1 = no limit."""
    k_max: PositiveCount | None = None
    """Most experts per token after piggybacking; the model's top-k if absent."""
    max_rank: PositiveCount | None = None
    """Lowest preference rank that may piggyback; all experts if absent."""

    def rule(self, place: Place) -> Rule:
        return Rule(
            k0=self.k0.value(place.layer, place.live_rows),
            p=self.p,
            k_max=limit(self.k_max),
            max_rank=limit(self.max_rank),
            **self.weights(),
        )

    def check(self, top_k: int, num_experts: int) -> list[str]:
        limits = {
            "k0": (max(self.k0.values()), "top_k", top_k),
            "k_max": (self.k_max or 1, "top_k", top_k),
            "max_rank": (self.max_rank or 1, "number of experts", num_experts),
        }
        return [
            f"{name}: {value} exceeds the model's {what} of {limit}"
            for name, (value, what, limit) in limits.items()
            if value > limit
        ]

    def doubts(self, top_k: int, num_experts: int) -> list[str]:
        least = min(self.k0.values())
        return [
            f"{name}: {value} is not above k0, so that no token can use what the batch loads: "
            "this is topk by another name"
            for name, value in (("k_max", self.k_max), ("max_rank", self.max_rank))
            if value is not None and value <= least < top_k and self.p == 1.0
        ]
