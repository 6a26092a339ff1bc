"""The plain-torch reference: any mix of policies per row, static shapes, no host sync.

It is what every faster implementation is held to, and what serves where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FREE, PAD, FreeSlots
from .table import Flag, PolicyTable
from .torch_policy import Batch, Rows, TorchPolicy, fill_slots

QUANTUM = 2.0**-16
"""Demand is summed in whole quanta: the sum does not depend on its order. 65,535 rows fit 32 bits.
"""


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
    rules = _Rules(table, policy_ids, live)
    rows = _RuledBatch(
        rank=rank,
        order=order,
        chosen=chosen,
        gates=gates.float().nan_to_num(nan=0.0),
        topk_ids=torch.where(in_range, ids, order[:, :1]),
        topk_weights=torch.where(in_range, topk_weights.float(), 0.0),
        renormalize=renormalize,
        scale=scale,
        similarity=table.similarity,
    )
    by_torch = [(p, _rows_of(p, i, rows, rules, table)) for i, p in table.torch_policies.items()]

    required = torch.where(rules.reroutes[:, None], rows.required(rules), chosen)
    for policy, mine in by_torch:
        required = torch.where(mine.mine[:, None], policy.required(mine), required)
    union = rows.fill(rules, (required & live[:, None]).any(dim=0))  # [num_experts]

    new_ids, new_weights = topk_ids, topk_weights
    touched = rules.reroutes & ~rows.keep_base(rules, union)
    outcomes = [(touched, rows.settle(rules, union))]
    outcomes += [(mine.mine, policy.reroute(mine, union)) for policy, mine in by_torch]
    for selected, outcome in outcomes:
        chosen_ids, chosen_weights = _merge(*outcome, free_slots)
        selected = selected[:, None]
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


class _Rules:
    """The words of every row's policy at this number of live rows, ``[num_tokens]`` each."""

    def __init__(self, table: PolicyTable, policy_ids: Tensor, live: Tensor):
        starts = table.column("start")[:1]
        reached = (starts <= live.sum()).sum() - 1  # 0-dimensional: not read on the host
        self._policy = torch.where(live, policy_ids, 0).long()
        self._step = reached.expand_as(self._policy)
        self._table = table
        flags = torch.where(live, self["flags"], 0)
        self.reroutes = self._has(flags, Flag.REROUTES)
        self.moves = self._has(flags, Flag.MOVES)
        self.compensates = self._has(flags, Flag.COMPENSATES)
        self.has_coefficients = self._has(flags, Flag.HAS_COEFFICIENTS)

    def __getitem__(self, name: str) -> Tensor:
        return self._table.column(name)[self._policy, self._step]

    def of(self, policy: int) -> Tensor:
        """bool ``[num_tokens]``: rows of this policy, where it is engaged."""
        return self.reroutes & (self._policy == policy)

    @staticmethod
    def _has(flags: Tensor, flag: Flag) -> Tensor:
        return (flags & int(flag)) != 0


def _rows_of(
    policy: TorchPolicy, index: int, batch: _RuledBatch, rules: _Rules, table: PolicyTable
) -> Rows:
    similarity = None
    if policy.uses_similarity:
        artifact = table.column("artifact")[index].amax().long()
        similarity = batch.similarity.index_select(0, artifact[None])[0]
    shared = {name: value for name, value in vars(batch).items() if name != "similarity"}
    return Rows(layer=table.layer, mine=rules.of(index), similarity=similarity, **shared)


@dataclass(frozen=True)
class _RuledBatch(Batch):
    """The steps of the rule on the rows of a call.

    Attributes:
        similarity: float32 ``[num_matrices, num_experts, num_experts]``.
    """

    similarity: Tensor

    @property
    def base(self) -> Tensor:
        """``[num_tokens, top_k]`` first experts in rank order."""
        return self.order[:, : self.top_k]

    def required(self, rules: _Rules) -> Tensor:
        """Step 1: bool ``[num_tokens, num_experts]``, the experts that each row insists on.

        OEA, arXiv 2511.02237, Algorithm 2, phase 1.
        """
        mass = self.gates.gather(1, self.base).cumsum(dim=1) / self.gates.sum(dim=1, keepdim=True)
        p = rules["p"][:, None]
        short = ~(mass >= p) | (p >= 1)  # without any mass, and at p = 1, there is no limit
        needed = 1 + short[:, :-1].long().cumprod(dim=1).sum(dim=1)
        return self.rank < torch.minimum(rules["k0"].long(), needed)[:, None]

    def fill(self, rules: _Rules, union: Tensor) -> Tensor:
        """Step 2: bool ``[num_experts]``, `union` and the experts that rows demand most."""
        if len(self.rank) == 0:
            return union
        wanted = torch.where(rules.reroutes, rules["max_active"], 0)  # [num_tokens]
        demand = torch.where((wanted > 0)[:, None], self._demand(rules["exponent"]), 0).sum(dim=0)
        order = demand.argsort(descending=True, stable=True)  # ties to the lower id
        return union | ((demand > 0) & (order.argsort() < wanted.amax()))

    def _demand(self, exponent: Tensor) -> Tensor:
        """int64 ``[num_tokens, num_experts]``, quanta; at least 1 for an expert with any gate."""
        gates = self.gates.gather(1, self.base)
        share = (gates / gates.sum(dim=1, keepdim=True)).clamp(max=1)
        exponent = exponent[:, None]
        utility = torch.where(exponent == 2, share * share, torch.where(exponent == 1, share, 1.0))
        quanta = (utility / QUANTUM + 0.5).nan_to_num(nan=0.0).long().clamp(min=1)
        quanta = torch.where(share > 0, quanta, 0)
        return torch.zeros_like(self.rank).scatter_(1, self.base, quanta)

    def keep_base(self, rules: _Rules, union: Tensor) -> Tensor:
        """bool ``[num_tokens]``: rows whose whole choice is loaded, and that nothing cuts."""
        is_cut = torch.minimum(rules["k_max"], rules["max_rank"]) < self.top_k
        is_loaded = (self.chosen & union).sum(dim=1) == self.top_k
        return is_loaded & (rules.moves | ~is_cut)

    def settle(self, rules: _Rules, union: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 3 and 4: experts and weights of every row, ``[num_tokens, top_k]`` each."""
        taken = self._take(rules, union)
        ids, is_filled = fill_slots(taken, self.rank, self.order, self.top_k)
        weights = self._weigh(rules, taken, ids, is_filled)
        has_weight = (taken & (self.gates > 0)).any(dim=1, keepdim=True)
        own = rules.moves[:, None] | ~has_weight
        moved_ids, moved_weights = self._move(rules, union)
        return torch.where(own, moved_ids, ids), torch.where(own, moved_weights, weights)

    def _take(self, rules: _Rules, union: Tensor) -> Tensor:
        """bool ``[num_tokens, num_experts]``: the best of the union, required experts first."""
        required = self.required(rules)
        usable = required | (union & (self.rank < rules["max_rank"][:, None]))
        usable = usable.gather(1, self.order)  # in preference order
        limit = rules["k_max"].clamp(max=self.top_k)[:, None]
        kept = usable & (usable.cumsum(dim=1) <= limit)
        return kept.gather(1, self.rank) | required

    def _weigh(self, rules: _Rules, taken: Tensor, ids: Tensor, is_filled: Tensor) -> Tensor:
        """Weights of what was taken, what was lost accounted for."""
        gates = torch.where(is_filled, self.gates.gather(1, ids), 0.0)
        own = self.topk_weights.sum(dim=1, keepdim=True)
        base = self.gates.gather(1, self.base)
        kept = torch.where(taken.gather(1, self.base), base, 0.0).sum(dim=1, keepdim=True)
        total = base.sum(dim=1, keepdim=True)
        kept = torch.where(total > 0, kept / total, 1.0)
        wanted = own * (kept + rules["compensation"][:, None] * (1 - kept))
        wanted = torch.where(rules.compensates[:, None], wanted, own)
        rescaled = gates / gates.sum(dim=1, keepdim=True) * wanted
        if not self.renormalize:
            rescaled = torch.where(rules.compensates[:, None], rescaled, gates * self.scale)
        return self._map(rules, ids, is_filled, rescaled)

    def _map(self, rules: _Rules, ids: Tensor, is_filled: Tensor, weights: Tensor) -> Tensor:
        """`weights`, with the row's share of its own weights on their experts' stand-ins."""
        if len(self.similarity) == 0:
            return weights
        share = rules["mapped_share"][:, None]
        own = members(torch.where(is_filled, ids, -1), self.num_experts)
        artifact = rules["artifact"].long()[:, None]
        likeness = self.similarity[artifact, self.topk_ids]  # [num_tokens, top_k, num_experts]
        nearest = torch.where(own[:, None], likeness, -torch.inf).argmax(dim=2)
        target = torch.where(own.gather(1, self.topk_ids), self.topk_ids, nearest)
        mapped = torch.zeros_like(self.gates).scatter_add_(1, target, self.topk_weights)
        mapped = torch.where(is_filled, mapped.gather(1, ids), 0.0)
        return torch.where(share > 0, weights * (1 - share) + mapped * share, weights)

    def _move(self, rules: _Rules, union: Tensor) -> tuple[Tensor, Tensor]:
        """The row's own slots; under a threshold those without a home move to stand-ins.

        SERE, arXiv 2602.07616.
        """
        if len(self.similarity) == 0:
            return self.topk_ids, self.topk_weights
        loaded = torch.where(union, self.similarity, -torch.inf)  # [num_matrices, N, N]
        nearest = loaded.argmax(dim=2)  # first maximum: ties to the lowest id
        likeness = loaded.gather(2, nearest[:, :, None])[:, :, 0]  # [num_matrices, N]

        ids, artifact = self.topk_ids, rules["artifact"].long()[:, None]
        is_critical = likeness[artifact, ids] < rules["threshold"][:, None]
        moves = rules.moves[:, None] & ~(union[ids] | is_critical)
        stand_ins = nearest[artifact, ids]
        has_coefficients = rules.has_coefficients[:, None]
        following = torch.where(has_coefficients, artifact + 1, 0)
        factor = torch.where(
            has_coefficients,
            self.similarity[following, ids, stand_ins],
            rules["compensation"][:, None],
        )
        weights = torch.where(moves, self.topk_weights * factor, self.topk_weights)
        return torch.where(moves, stand_ins, ids), weights


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


def members(ids: Tensor, num_experts: int) -> Tensor:
    """bool ``[num_tokens, num_experts]``: experts that each row of ``[num_tokens, top_k]`` names.

    Ids outside ``[0, num_experts)`` name nobody.
    """
    ids = ids.long()
    places = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    named = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.bool, device=ids.device)
    return named.scatter_(1, places, True)[:, :num_experts]
