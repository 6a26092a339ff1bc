"""What the re-routing is about: a MoE layer, a forward and its plan, one call of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import BoundLayer
from ..policies import FreeSlots, PolicyTable, Router


@dataclass
class Layer:
    """One routed MoE layer.

    Attributes:
        layer_id: the model's layer number.
        index: place among the MoE layers of this process.
        num_experts: routed experts, shared and redundant ones not counted.
        top_k: routed experts per token.
        free_slots: the id that the layer's MoE runner takes in slots without an expert.
        has_kernels: whether compiled kernels hold a layer of this size; else, and while some
            policy is written in torch, the torch reference serves.
        union: bool ``[num_experts]``, where the kernels leave the union of a call.
        kernels: the compiled re-routing, bound to `table`; see `ServedModel.bind`.
    """

    layer_id: int
    index: int
    num_experts: int
    top_k: int
    router: Router
    free_slots: FreeSlots
    table: PolicyTable
    has_kernels: bool
    union: Tensor
    kernels: BoundLayer | None = None

    @property
    def uses_kernels(self) -> bool:
        return self.has_kernels and not self.table.torch_policies

    def follow_bias(self, bias: Tensor | None) -> None:
        """Score with the router's bias of now: an update of the weights may replace the tensor."""
        if bias is not self.router.bias:
            self.router = replace(self.router, bias=bias)


@dataclass(frozen=True)
class Plan:
    """Which policy each row of one forward follows.

    Attributes:
        policy_ids: one per row, in row order.
        group_ids: isolation group of each row.
        request_ids: request of each row, for the recorder.
        phase: SGLang's name of the forward mode.
        is_decode: whether every row is a decode token.
    """

    policy_ids: Sequence[int]
    group_ids: Sequence[int]
    request_ids: Sequence[str]
    phase: str
    is_decode: bool

    @cached_property
    def reroutes(self) -> bool:
        return any(self.policy_ids)


@dataclass
class Step:
    """One forward under way, or the capture of graphs.

    Attributes:
        plan: None while graphs are captured: all rows are padded then.
        passed: index and ids of the calls that nobody re-routes and that wait to be counted; None
            where every call is re-routed.
        asked: index of each layer that has asked for its routing, in order.
        num_graph_runs: how often the forward of a graph was run.
        is_written: whether the rows are on the device.
    """

    plan: Plan | None
    passed: list[tuple[int, Tensor]] | None = None
    asked: list[int] = field(default_factory=list)
    num_graph_runs: int = 0
    is_written: bool = False

    @property
    def counts(self) -> bool:
        """Whether its calls are counted: decode steps are, also those of a replay."""
        return self.plan is None or self.plan.is_decode


class Call(NamedTuple):
    """One MoE call: what the router chose, to be re-routed in place.

    Attributes:
        router_logits: ``[num_rows, num_experts]``.
        ids, weights: routed columns, ``[num_rows, top_k]``.
    """

    layer: Layer
    num_rows: int
    router_logits: Tensor
    ids: Tensor
    weights: Tensor

    def clone(self) -> Call:
        return self._replace(ids=self.ids.clone(), weights=self.weights.clone())

    def take(self, rows: Tensor, other: Call) -> None:
        """Take over the `rows`, bool ``[num_rows, 1]``, of `other`."""
        self.ids.copy_(torch.where(rows, other.ids, self.ids))
        self.weights.copy_(torch.where(rows, other.weights, self.weights))
