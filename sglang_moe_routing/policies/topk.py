"""`topk`: plain pruning to each token's best experts (OEA's first phase alone)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from .base import Count, Parameters, Policy, Rows, Schedule


class TopK(Policy):
    """Each token keeps its best `k0` experts and nothing else; weights are renormalised.

    The honest baseline of batch-aware policies (OEA, arXiv 2511.02237, "pruned"). It is the only
    lossy policy whose routing of a token does not depend on what other tokens share the batch
    (only on how many, if `k0` or `engage` say so).
    """

    kind: Literal["topk"] = "topk"
    k0: Count
    """Experts that each token keeps."""

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        return {"k0": self.k0}

    def is_vanilla(self, layer: int, num_rows: int, top_k: int) -> bool:
        return self.k0.value(layer, num_rows) >= top_k

    def check(self, top_k: int, num_experts: int) -> list[str]:
        worst = max(self.k0.values())
        return [f"k0: {worst} exceeds the model's top_k of {top_k}"] if worst > top_k else []

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.rank < parameters["k0"][:, None]

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.take(rows.rank < parameters["k0"][:, None])
