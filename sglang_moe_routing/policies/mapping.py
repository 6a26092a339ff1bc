"""Mapping: part of a token's weight follows its experts to their stand-ins, as in SERE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import shorten
from .base import Parameters, Policy, Rows, Schedule
from .reference import members


class Mapped(Policy):
    """Base of kinds that choose experts inside the union and can map weights by similarity.

    With ``mapped_share`` s a token's weights are ``(1 - s) * chosen + s * mapped``. `chosen` are
    the model's weights over the experts that it ends up with. `mapped` are the router's own
    weights, each on its own expert where the token still has it, else on the most similar of the
    experts that it has (ties to the lowest id). Which experts run does not change.
    """

    mapped_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the weight that follows each lost expert to the most similar one that the token has;
    0 needs no similarity artifact."""
    similarity: str | None = None
    """Which artifact of the top-level `similarity` section; may be left out if there is one."""

    @model_validator(mode="after")
    def _similarity_is_used(self) -> Self:
        if self.similarity is not None and not self.uses_similarity:
            raise ValueError(
                f"similarity: {shorten(self.similarity)} has no effect without a mapped_share "
                "above 0"
            )
        return self

    @property
    def uses_similarity(self) -> bool:
        return self.mapped_share > 0

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        return {"mapped_share": self.mapped_share}

    @classmethod
    def take(cls, rows: Rows, parameters: Parameters, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """`Rows.take`, with the row's share of weight mapped."""
        ids, weights = rows.take(chosen)
        if len(rows.similarity) == 0:
            return ids, weights
        share = parameters["mapped_share"].float()[:, None]
        own = members(ids, rows.num_experts)
        artifact = parameters["artifact"].long()[:, None]
        likeness = rows.similarity[artifact, rows.topk_ids]  # [num_tokens, top_k, num_experts]
        nearest = torch.where(own[:, None], likeness, -torch.inf).argmax(dim=2)
        target = torch.where(own.gather(1, rows.topk_ids), rows.topk_ids, nearest)
        mapped = torch.zeros_like(rows.gates).scatter_add_(1, target, rows.topk_weights)
        is_free = ids == ids[:, :1]
        is_free[:, 0] = False
        blended = weights * (1 - share) + torch.where(is_free, 0.0, mapped.gather(1, ids)) * share
        return ids, torch.where((share > 0) & rows.has_weight(chosen), blended, weights)
