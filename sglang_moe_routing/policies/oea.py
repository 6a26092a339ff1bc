"""`oea`: Opportunistic Expert Activation (arXiv 2511.02237, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Count, Parameters, PositiveCount, Rows, Schedule
from .mapping import Mapped


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

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        unlimited = torch.iinfo(torch.int32).max
        return {
            "k0": self.k0,
            "p": self.p,
            "k_max": self.k_max or unlimited,
            "max_rank": self.max_rank or unlimited,
            **super().parameters(),
        }

    def is_vanilla(self, layer: int, num_rows: int, top_k: int) -> bool:
        return self.k0.value(layer, num_rows) >= top_k and self.p == 1.0

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

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.rank < cls._num_baseline(rows, parameters)[:, None]

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        baseline = rows.rank < cls._num_baseline(rows, parameters)[:, None]
        piggyback = union & (rows.rank < parameters["max_rank"][:, None])
        usable = (baseline | piggyback).gather(1, rows.order)  # in preference order
        limit = parameters["k_max"].clamp(max=rows.top_k)[:, None]
        kept = usable & (usable.cumsum(dim=1) <= limit)
        return cls.take(rows, parameters, kept.gather(1, rows.rank) | baseline)

    @classmethod
    def _num_baseline(cls, rows: Rows, parameters: Parameters) -> Tensor:
        """``[num_tokens]`` experts that each token is guaranteed (Algorithm 2, phase 1)."""
        base = rows.order[:, : rows.top_k]
        mass = rows.gates.gather(1, base).cumsum(dim=1) / rows.gates.sum(dim=1, keepdim=True)
        p = parameters["p"][:, None]
        short = ~(mass >= p) | (p >= 1)  # without any mass, and at p = 1, there is no limit
        needed = 1 + short[:, :-1].long().cumprod(dim=1).sum(dim=1)
        return torch.minimum(parameters["k0"].long(), needed)
