"""What a model's router ranks by and weighs with, recomputed from its raw logits.

The engine hands over only its top-k; a policy also needs the ranks beyond and their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]


FAINTEST = -80.0
"""Logit, under softmax relative to the row's largest, below which the gate is 0. Just beyond it
float32 underflows, at a point that depends on the device; this one is the same on all."""


@dataclass(frozen=True)
class Router:
    """How a model turns router logits into experts and weights.

    Attributes:
        scoring: from logits to gates.
        renormalize: whether the weights of the chosen experts are normalised over them.
        scale: factor on the weights, 1 where the engine applies it elsewhere.
        bias: float32 ``[num_experts]`` added to the gates for ranking only (DeepSeek-V3).
        num_groups, top_groups: experts are split into `num_groups` equal groups of which only
            the best `top_groups` may be chosen; 1 and 1 without groups.
    """

    scoring: Scoring = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1

    def score(self, logits: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ranking scores and combine weights of every expert.

        Args:
            logits: float ``[num_tokens, num_experts]``.
            chosen: integer ``[num_tokens, top_k]``, the experts that the engine chose. They count
                as allowed whatever groups are recomputed here: its choice stands, ties included.

        Returns:
            ``(scores, gates)``, float32 ``[num_tokens, num_experts]``. Where the gate is a
            monotone function of the logit, scores are the logits themselves, so that ranks are
            exact on every device. Experts outside a row's best groups score -inf and have gate
            0, as have experts with a NaN logit (which keep their NaN score) and those whose
            logit is below `FAINTEST`.
        """
        logits = logits.float()
        gates = self._gates(logits)
        scores = logits
        if self.bias is not None:
            scores = torch.where(logits.isnan(), logits, gates + self.bias)
        if self.num_groups > 1:
            allowed = self._allowed(scores, chosen)
            scores = torch.where(allowed, scores, -torch.inf)
            gates = torch.where(allowed, gates, 0.0)
        return scores, gates

    def _gates(self, logits: Tensor) -> Tensor:
        finite = torch.finfo(torch.float32)
        logits = logits.nan_to_num(nan=-torch.inf, posinf=finite.max, neginf=-torch.inf)
        if self.scoring == "softmax":
            gates = logits.softmax(dim=1).nan_to_num(nan=0.0)  # a row of -inf alone has no mass
            logits = logits - logits.amax(dim=1, keepdim=True)
        elif self.scoring == "sigmoid":
            gates = logits.sigmoid()
        else:
            gates = torch.nn.functional.softplus(logits).sqrt()
        return torch.where(logits < FAINTEST, 0.0, gates)

    def _allowed(self, scores: Tensor, chosen: Tensor | None) -> Tensor:
        """bool ``[num_tokens, num_experts]``: experts of each row's best groups, and `chosen`."""
        grouped = scores.nan_to_num(nan=-torch.inf).unflatten(1, (self.num_groups, -1))
        if self.bias is None:
            strength = grouped.amax(dim=2)
        else:  # DeepSeek-V3: a group is as good as its best two experts
            strength = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        order = strength.argsort(dim=1, descending=True, stable=True)  # ties to the lower group
        best = torch.zeros_like(strength, dtype=torch.bool)
        best.scatter_(1, order[:, : self.top_groups], True)
        allowed = best[:, :, None].expand_as(grouped).flatten(1)
        if chosen is None:
            return allowed
        num_experts = scores.shape[1]
        in_range = (chosen >= 0) & (chosen < num_experts)
        places = torch.where(in_range, chosen.long(), num_experts)
        padded = torch.nn.functional.pad(allowed, (0, 1))
        return padded.scatter_(1, places, True)[:, :num_experts]
