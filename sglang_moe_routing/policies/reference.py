"""The plain-torch reference: any mix of policies per row, static shapes, no host sync.

It is what every faster implementation is held to, and what serves where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FREE, PAD, FreeSlots, Parameters, Rows
from .table import PolicyTable


@dataclass(frozen=True)
class Rerouted:
    """The outcome of one MoE call.

    Attributes:
        topk_ids, topk_weights: ``[num_tokens, top_k]`` in the dtypes that came in.
        union: bool ``[num_experts]``, what is loaded for the rows' sake (U).
        active: int64 scalar, distinct experts of the live rows now (T).
        active_base: int64 scalar, distinct experts that the router had chosen (T_base).
        moved_slots: int64 scalar, slots of the router's choice whose expert the row uses no more.
        critical: int64 scalar, active experts outside `union`: nothing loaded could stand in.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    union: Tensor
    active: Tensor
    active_base: Tensor
    moved_slots: Tensor
    critical: Tensor


def reroute(
    scores: Tensor,
    gates: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    *,
    renormalize: bool,
    scale: float = 1.0,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> Rerouted:
    """Re-route one MoE call whose rows follow different policies.

    Inputs are not modified. Nothing synchronises the device; shapes depend on inputs' shapes
    alone, so the call is safe under CUDA-graph capture.

    Args:
        scores: float32 ``[num_tokens, num_experts]``, what the router ranks by. NaN ranks last.
        gates: float32 ``[num_tokens, num_experts]``, combine weights before normalisation.
        topk_ids: integer ``[num_tokens, top_k]``, the router's choice, in any column order.
        topk_weights: float ``[num_tokens, top_k]``, its weights.
        policy_ids: integer ``[num_tokens]``, row of `table` per token; `PAD` marks padding.
        renormalize: whether the model normalises weights over the chosen experts.
        scale: the model's factor on raw gates where `renormalize` is false.
        free_slots: the id of slots that hold no expert.

    Returns:
        Vanilla rows bit for bit as they came. Other rows hold distinct experts in
        ``[0, num_experts)`` whatever the input: where a policy sends several slots to one expert,
        the first of them holds it, with their sum, and the others are free. Padded rows are free
        in every slot.
    """
    live = policy_ids != PAD
    num_experts = scores.shape[1]
    ids = topk_ids.long()
    in_range = (ids >= 0) & (ids < num_experts)
    rank, order, chosen = _preference(scores, torch.where(in_range, ids, num_experts))
    first = order[:, :1]
    rows = Rows(
        rank=rank,
        order=order,
        chosen=chosen,
        gates=gates.float().nan_to_num(nan=0.0),
        topk_ids=torch.where(in_range, ids, first),
        topk_weights=torch.where(in_range, topk_weights.float(), 0.0),
        renormalize=renormalize,
        scale=scale,
        similarity=table.similarity,
    )
    kind, parameters = _look_up(table, policy_ids, live)

    required = torch.zeros_like(rank, dtype=torch.bool)
    for index, policy in enumerate(table.kinds):
        selected = live & (kind == index)
        mask = policy.required(rows, parameters, selected)
        required |= mask & selected[:, None]
    union = required.any(dim=0)  # [num_experts]
    for index, policy in enumerate(table.kinds):
        union = policy.fill(rows, parameters, live & (kind == index), union)

    new_ids, new_weights = topk_ids, topk_weights
    for index, policy in enumerate(table.kinds[1:], start=1):
        chosen_ids, chosen_weights = _merge(*policy.reroute(rows, parameters, union), free_slots)
        selected = (live & (kind == index))[:, None]
        new_ids = torch.where(selected, chosen_ids.to(topk_ids.dtype), new_ids)
        new_weights = torch.where(selected, chosen_weights.to(topk_weights.dtype), new_weights)

    final, base = members(new_ids, num_experts), members(topk_ids, num_experts)
    final, base = final & live[:, None], base & live[:, None]
    kept = final.gather(1, ids.clamp(0, num_experts - 1)) | ~in_range | ~live[:, None]
    active = final.any(dim=0)
    padding = FREE if free_slots is FreeSlots.IGNORED else union.int().argmax().to(topk_ids.dtype)
    return Rerouted(
        topk_ids=torch.where(live[:, None], new_ids, padding),
        topk_weights=torch.where(live[:, None], new_weights, 0.0),
        union=union,
        active=active.sum(),
        active_base=base.any(dim=0).sum(),
        moved_slots=(~kept).sum(),
        critical=(active & ~union).sum(),
    )


def _preference(scores: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank every expert of every row: `base` first, then falling score, ties to the lower id.

    Args:
        base: int64 ``[num_tokens, top_k]``; `num_experts` marks an invalid entry.

    Returns:
        ``(rank, order, is_base)``, ``[num_tokens, num_experts]``: the first two int64 and inverse
        to each other, the third bool.
    """
    num_experts = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal +0.0
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # same order as the floats
    key = torch.where(scores.isnan(), torch.iinfo(torch.int32).min, key)
    is_base = members(base, num_experts)
    order = (key + (is_base.long() << 33)).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(num_experts, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places), order, is_base


def _merge(ids: Tensor, weights: Tensor, free_slots: FreeSlots) -> tuple[Tensor, Tensor]:
    """Gather what several slots of a row give one expert in the first of them; the others are free.

    Both ``[num_tokens, top_k]``. The first slot of a row is never free.
    """
    same = ids[:, :, None] == ids[:, None, :]  # [num_tokens, top_k, top_k]
    total = torch.where(same, weights[:, None, :], 0.0).sum(dim=2)
    weights = torch.where(same.sum(dim=2) > 1, total, weights)
    is_free = same.tril(diagonal=-1).any(dim=2)
    free_id = FREE if free_slots is FreeSlots.IGNORED else ids[:, :1]
    return torch.where(is_free, free_id, ids), torch.where(is_free, 0.0, weights)


def _look_up(table: PolicyTable, policy_ids: Tensor, live: Tensor) -> tuple[Tensor, Parameters]:
    """Kind and parameters of every row, given how many rows are live."""
    policy = torch.where(live, policy_ids, 0).long()
    step = torch.bucketize(live.sum(), table.starts, right=True)
    step = step.expand_as(policy)  # a 0-dimensional index would be read on the host
    kind = table.kind[policy, step]
    return kind, {name: values[policy, step] for name, values in table.parameters.items()}


def members(ids: Tensor, num_experts: int) -> Tensor:
    """bool ``[num_tokens, num_experts]``: experts that each row of ``[num_tokens, top_k]`` names.

    Ids outside ``[0, num_experts)`` name nobody.
    """
    ids = ids.long()
    places = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    named = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.bool, device=ids.device)
    return named.scatter_(1, places, True)[:, :num_experts]
