"""`sere`: Similarity-based Expert Re-routing (arXiv 2602.07616)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .base import Count, Parameters, Policy, Rows, Schedule, Similarity, SimilaritySchedule


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
    similarity: str | None = None
    """Which artifact of the top-level `similarity` section; may be left out if there is one."""

    @property
    def uses_similarity(self) -> bool:
        return True

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        return {"num_primary": self.num_primary, "threshold": self.threshold}

    def is_vanilla(self, layer: int, num_rows: int, top_k: int) -> bool:
        return self.num_primary.value(layer, num_rows) >= top_k

    def check(self, top_k: int, num_experts: int) -> list[str]:
        worst = max(self.num_primary.values())
        if worst > top_k:
            return [f"num_primary: {worst} exceeds the model's top_k of {top_k}"]
        return []

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.rank < parameters["num_primary"][:, None]

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        loaded = torch.where(union, rows.similarity, -torch.inf)  # [artifacts, N, N]
        nearest = loaded.argmax(dim=2)  # first maximum: ties to the lowest id
        likeness = loaded.gather(2, nearest[:, :, None])[:, :, 0]  # [artifacts, N]

        ids, artifact = rows.topk_ids, parameters["artifact"].long()[:, None]
        is_primary = rows.rank.gather(1, ids) < parameters["num_primary"][:, None]
        is_critical = likeness[artifact, ids] < parameters["threshold"][:, None]
        stays = is_primary | union[ids] | is_critical
        return torch.where(stays, ids, nearest[artifact, ids]), rows.topk_weights
