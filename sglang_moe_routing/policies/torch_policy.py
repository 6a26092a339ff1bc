"""The escape hatch: a policy in plain torch, for what no `Rule` says. It keeps a server off the
compiled kernels, for the rows of every policy, so that a config has to ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Policy
from .rule import Place, Rule


@dataclass(frozen=True)
class Batch:
    """The rows of one MoE call. All tensors are on one device; none may be modified.

    Attributes:
        rank: int64 ``[num_tokens, num_experts]``, place of an expert in the row's preference
            (0 is best): the router's own top-k first, then by falling score, ties to the lower
            expert id, NaN last.
        order: int64 ``[num_tokens, num_experts]``, inverse of `rank`: the expert at each place.
        chosen: bool ``[num_tokens, num_experts]``, the router's own top-k.
        gates: float32 ``[num_tokens, num_experts]``, the model's combine weight of each expert
            before normalisation; NaN counts as 0.
        topk_ids: int64 ``[num_tokens, top_k]``, the router's choice in the engine's column order.
        topk_weights: float32 ``[num_tokens, top_k]``, its weights.
        renormalize: whether the model normalises over the chosen experts.
        scale: factor on raw gates where `renormalize` is false.
    """

    rank: Tensor
    order: Tensor
    chosen: Tensor
    gates: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    renormalize: bool
    scale: float

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.rank.shape[1]


@dataclass(frozen=True)
class Rows(Batch):
    """One MoE call as a `TorchPolicy` sees it.

    Attributes:
        layer: the model's layer number.
        mine: bool ``[num_tokens]``, the live rows that follow the policy and are engaged.
        similarity: float32 ``[num_experts, num_experts]`` of the policy's artifact on this layer;
            None if it uses none.
    """

    layer: int
    mine: Tensor
    similarity: Tensor | None

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the top-k slots with the `chosen` experts and the weights the model gives them.

        Args:
            chosen: bool ``[num_tokens, num_experts]``, at most `top_k` per row.

        Returns:
            ``(topk_ids, topk_weights)`` in preference order. Slots left over repeat the row's first
            expert at weight 0. Weights are renormalised to the sum of the incoming row where
            the model normalises, else raw gates times `scale`. A row whose chosen experts have no
            weight keeps the router's choice and its weights.
        """
        ids, is_filled = fill_slots(chosen, self.rank, self.order, self.top_k)
        gates = torch.where(is_filled, self.gates.gather(1, ids), 0.0)
        if self.renormalize:
            wanted = self.topk_weights.sum(dim=1, keepdim=True)
            weights = gates / gates.sum(dim=1, keepdim=True) * wanted
        else:
            weights = gates * self.scale
        has_weight = (gates > 0).any(dim=1, keepdim=True)
        ids = torch.where(has_weight, ids, self.topk_ids)
        return ids, torch.where(has_weight, weights, self.topk_weights)


def fill_slots(chosen: Tensor, rank: Tensor, order: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Put the `chosen` experts into slots, in preference order.

    Returns:
        ``(ids, is_filled)``, ``[num_tokens, top_k]``. Slots left over repeat the first expert.
    """
    num_experts = rank.shape[1]
    places = torch.where(chosen, rank, num_experts).sort(dim=1).values[:, :top_k]
    is_filled = places < num_experts
    first = places[:, :1].clamp(max=num_experts - 1)
    return order.gather(1, torch.where(is_filled, places, first)), is_filled


class TorchPolicy(Policy):
    """A policy that computes its rows itself, in two passes over one MoE call.

    Both run on every row with static shapes and must not synchronise the host, so that they can be
    baked into a CUDA graph; what they say of rows that are not `Rows.mine` is discarded. Where an
    expert's weight ends in several slots of a row, they are merged afterwards.

    Prefer `Policy.rule`: while a `TorchPolicy` is listed, rows of *every* policy are computed by
    the plain-torch reference, many times slower. A config must say ``torch_policies: allow``.
    """

    def rule(self, place: Place) -> Rule:
        """Of no account: `required` and `reroute` speak for this policy."""
        return Rule(k0=0)

    def required(self, rows: Rows) -> Tensor:
        """Pass 1: bool ``[num_tokens, num_experts]``, the experts that each row insists on.

        Their union over all live rows is U: it is loaded whatever happens next.
        """
        raise NotImplementedError

    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        """Pass 2: ``(topk_ids, topk_weights)``, ``[num_tokens, top_k]`` each.

        Args:
            union: bool ``[num_experts]``, U.

        Returns:
            Ids in ``[0, num_experts)``; slots of a row may name one expert.
        """
        raise NotImplementedError
