"""The re-routing by compiled kernels: `BoundLayer` for a layer's calls, `refine` for one call.

A call on a CPU is over in microseconds, so what a layer's calls have in common is checked once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..policies import FreeSlots, PolicyTable, Router
from . import native

ONE_LAUNCH_ROWS = 16
"""Up to so many rows a CUDA call is one launch; beyond it is two, which need a workspace."""

WORKSPACE_WORDS = 147456
"""Elements of the int32 workspace."""

NOT_COUNTED = -1
"""The part of the statistics of a call that is not counted."""

_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}


class BoundLayer:
    """The re-routing of one layer. Its tensors are kept, and read anew at every call.

    Args:
        router: how the model turns logits into gates; its bias goes with each call.
        union: bool ``[num_experts]``, where calls leave the union U.
        top_k: experts per token.
        statistics: int64 ``[parts, 6]``; a call adds to one part: calls, rows, active experts,
            active experts of the engine's choice, moved slots, critical experts.
        workspace: int32 ``[WORKSPACE_WORDS]`` of any contents; needed on CUDA above
            `ONE_LAUNCH_ROWS` rows. Calls that may overlap need one each.
        free_slots: the id of slots that hold no expert.

    Raises:
        ValueError: a tensor has the wrong shape, type or device, or a number is beyond the kernels'
            limits; the message names it.
        KernelError: no compiled kernels for this device.
    """

    __slots__ = ("_run",)

    def __init__(
        self,
        table: PolicyTable,
        router: Router,
        union: Tensor,
        *,
        top_k: int,
        statistics: Tensor | None = None,
        workspace: Tensor | None = None,
        free_slots: FreeSlots = FreeSlots.IGNORED,
    ) -> None:
        self._run = _module(union).bind(
            table.words,
            table.similarity,
            union,
            statistics,
            workspace,
            top_k,
            _SCORINGS[router.scoring],
            router.num_groups,
            router.top_groups,
            router.renormalize,
            router.scale,
            int(free_slots),
        )
        self._run.release_gil = False  # a call is over before another thread could take it

    def reroute(
        self,
        scores: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        policy_ids: Tensor,
        bias: Tensor | None = None,
        part: int = NOT_COUNTED,
        gates: Tensor | None = None,
    ) -> None:
        """Re-route the engine's choice in place; the compiled twin of `policies.reroute`.

        Allocates nothing where `scores` lie row by row and `bias` is float32, and never
        synchronises. What it launches depends on shapes only: safe under CUDA-graph capture.

        Args:
            scores: router logits ``[num_tokens, num_experts]``, float32, bfloat16 or float16; with
                `gates`, what the router ranks by.
            topk_ids: int32 or int64 ``[num_tokens, top_k]``, the engine's choice. Rows may lie
                apart.
            topk_weights: float ``[num_tokens, top_k]``, its weights. Rows may lie apart.
            policy_ids: int32 ``[num_tokens]``, row of the table per token; `PAD` marks padding. An
                id that the table lacks means vanilla.
            bias: float ``[num_experts]``, that of the router.
            part: which part of the statistics to add to, or `NOT_COUNTED`.
            gates: float ``[num_tokens, num_experts]``, combine weights before normalisation. With
                them only `renormalize` and `scale` of the router count.

        Raises:
            ValueError: a tensor has the wrong shape, type or device, or more than `MAX_ROWS` rows;
                the message names it.
        """
        if not scores.is_contiguous():
            scores = _adjacent(scores)
        if bias is not None and bias.dtype is not torch.float32:
            bias = bias.float()
        if gates is not None:
            gates = _adjacent(gates)
        self._run(scores, topk_ids, topk_weights, policy_ids, part, bias, gates)


def refine(
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    *,
    gates: Tensor | None = None,
    statistics: Tensor | None = None,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Re-route one call into new tensors; see `BoundLayer` for arguments and errors.

    Args:
        topk_ids, topk_weights: of any strides.
        statistics: int64 ``[6]`` to add to.

    Returns:
        ``(topk_ids, topk_weights, union)``: the first two in the types that came in, ``union``
        bool ``[num_experts]``.
    """
    ids, weights = (
        x.clone(memory_format=torch.contiguous_format) for x in (topk_ids, topk_weights)
    )
    union = scores.new_empty(scores.shape[-1:], dtype=torch.bool)
    layer = BoundLayer(
        table,
        router,
        union,
        top_k=ids.shape[-1],
        statistics=None if statistics is None else statistics[None],
        workspace=_new_workspace(scores),
        free_slots=free_slots,
    )
    part = NOT_COUNTED if statistics is None else 0
    layer.reroute(scores, ids, weights, policy_ids.contiguous(), router.bias, part, gates)
    return ids, weights, union


def workspace(device: torch.device | str) -> Tensor:
    """A new workspace for a `BoundLayer`."""
    return torch.empty(WORKSPACE_WORDS, dtype=torch.int32, device=device)


def _module(tensor: Tensor) -> Any:
    implementation = native.choose("cuda" if tensor.is_cuda else "cpu")
    if implementation.module is None:
        raise KernelError(f"no compiled kernels: {implementation.reason}")
    return implementation.module


def _adjacent(tensor: Tensor) -> Tensor:
    """Kernels want adjacent elements in a row; rows may lie apart."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _new_workspace(scores: Tensor) -> Tensor | None:
    needs_one = scores.is_cuda and scores.shape[0] > ONE_LAUNCH_ROWS
    return workspace(scores.device) if needs_one else None
