"""`topk`: plain pruning to each token's best experts (OEA's first phase alone)."""

from __future__ import annotations

from typing import Literal

from .base import exceeds_top_k
from .rule import Place, Rule
from .schedule import Count
from .weights import Compensated


class TopK(Compensated):
    """Each token keeps its best `k0` experts and nothing else; weights are renormalised.

    The honest baseline of batch-aware policies (OEA, arXiv 2511.02237, "pruned"). It is the only
    lossy policy whose routing of a token does not depend on what other tokens share the batch
    (only on how many, if `k0` or `engage` say so).
    """

    kind: Literal["topk"] = "topk"
    k0: Count
    """Experts that each token keeps."""

    def rule(self, place: Place) -> Rule:
        k0 = self.k0.value(place.layer, place.live_rows)
        return Rule(k0=k0, k_max=k0, compensation=self.compensation)

    def check(self, top_k: int, num_experts: int) -> list[str]:
        return exceeds_top_k("k0", max(self.k0.values()), top_k)
