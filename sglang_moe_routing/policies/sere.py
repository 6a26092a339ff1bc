"""`sere`: Similarity-based Expert Re-routing (arXiv 2602.07616)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Policy, exceeds_top_k
from .rule import Place, Rule
from .schedule import Count, Similarity, SimilaritySchedule


class SERE(Policy):
    """Send a token's secondary experts to the most similar expert that the batch loads anyway.

    A token's first `num_primary` experts (the paper's S) stay. Each other slot keeps its expert
    if the batch loads it, else moves to the loaded expert with the highest similarity; if that
    is below `threshold` (rho) the slot's own expert is critical and stays. Weights move with
    their slots: an expert on which several end weighs their sum. Ties go to the lowest expert id.
    """

    kind: Literal["sere"] = "sere"
    num_primary: Count
    """Experts that each token keeps whatever happens (S in the paper)."""
    threshold: Similarity = SimilaritySchedule(default=0.0)
    """Similarity below which an expert is critical and stays (rho in the paper)."""
    compensation: Annotated[float, Field(ge=0, le=1)] | None = None
    """Factor on the weight of every slot that moves. If absent: the coefficients of the artifact
    where its metric has some (`least_squares`), else 1, as in the paper."""
    similarity: str | None = None
    """Which artifact of the top-level `similarity` section; may be left out if there is one."""

    @property
    def uses_similarity(self) -> bool:
        return True

    def rule(self, place: Place) -> Rule:
        at = (place.layer, place.live_rows)
        return Rule(
            k0=self.num_primary.value(*at),
            threshold=self.threshold.value(*at),
            compensation=self.compensation,
        )

    def check(self, top_k: int, num_experts: int) -> list[str]:
        return exceeds_top_k("num_primary", max(self.num_primary.values()), top_k)
