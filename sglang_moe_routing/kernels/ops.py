"""The re-routing by compiled kernels: `refine`, and `refine_out` into the caller's tensors.

`refine_out` allocates nothing and never synchronises, and what it launches depends on shapes only,
so that it is safe under CUDA-graph capture.
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

_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_GIVEN = 3


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
    """Re-route the engine's choice; the compiled twin of `policies.reroute`.

    Args:
        scores: router logits ``[num_tokens, num_experts]``, float32, bfloat16 or float16; with
            `gates`, what the router ranks by.
        topk_ids: int32 or int64 ``[num_tokens, top_k]``, the engine's choice.
        topk_weights: float ``[num_tokens, top_k]``, its weights.
        policy_ids: int32 ``[num_tokens]``, row of `table` per token; `PAD` marks padding. An id
            that the table lacks means vanilla.
        router: how the model turns logits into gates; of no account but for `renormalize` and
            `scale` where `gates` is given.
        gates: float ``[num_tokens, num_experts]``, combine weights before normalisation.
        statistics: int64 ``[6]`` to add to: calls, rows, active experts, active experts of the
            engine's choice, moved slots, critical experts.
        free_slots: the id of slots that hold no expert.

    Returns:
        ``(topk_ids, topk_weights, union)``: the first two in the types that came in, ``union``
        bool ``[num_experts]``.

    Raises:
        ValueError: a tensor has the wrong shape, type or device, or more than `MAX_ROWS` rows; the
            message names it.
        KernelError: no compiled kernels for this device.
    """
    arguments = _refine_arguments(
        scores, gates, topk_ids, topk_weights, policy_ids, table, router, free_slots
    )
    return _run_refine(*arguments, statistics)


def refine_out(
    scores: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    *,
    out_ids: Tensor,
    out_weights: Tensor,
    out_union: Tensor,
    gates: Tensor | None = None,
    statistics: Tensor | None = None,
    workspace: Tensor | None = None,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> None:
    """`refine` into the caller's tensors. The outputs may be `topk_ids` and `topk_weights`.

    Args:
        workspace: int32 `[WORKSPACE_WORDS]` of any contents; needed on CUDA above
            `ONE_LAUNCH_ROWS` rows. Calls that may overlap need one each.
    """
    _run_refine_out(
        *_refine_arguments(
            scores, gates, topk_ids, topk_weights, policy_ids, table, router, free_slots
        ),
        out_ids=out_ids,
        out_weights=out_weights,
        out_union=out_union,
        statistics=statistics,
        workspace=workspace,
    )


def workspace(device: torch.device | str) -> Tensor:
    """A new workspace for `refine_out`."""
    return torch.empty(WORKSPACE_WORDS, dtype=torch.int32, device=device)


def _refine_arguments(
    scores: Tensor,
    gates: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    free_slots: FreeSlots,
) -> tuple[Any, ...]:
    is_given = gates is not None
    return (
        scores,
        gates,
        None if is_given or router.bias is None else router.bias.float(),
        topk_ids,
        topk_weights,
        policy_ids,
        table.words,
        table.similarity,
        _GIVEN if is_given else _SCORINGS[router.scoring],
        1 if is_given else router.num_groups,
        1 if is_given else router.top_groups,
        router.renormalize,
        router.scale,
        int(free_slots),
    )


def _module(tensor: Tensor) -> Any:
    implementation = native.choose("cuda" if tensor.is_cuda else "cpu")
    if implementation.module is None:
        raise KernelError(f"no compiled kernels: {implementation.reason}")
    return implementation.module


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Kernels want adjacent elements in a row; rows may lie apart."""
    if tensor is None:
        return None
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run_refine_out(
    scores: Tensor,
    gates: Tensor | None,
    bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    policy_ids: Tensor,
    policies: Tensor,
    similarity: Tensor,
    scoring: int,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scale: float,
    free_slots: int,
    *,
    out_ids: Tensor,
    out_weights: Tensor,
    out_union: Tensor,
    statistics: Tensor | None,
    workspace: Tensor | None,
) -> None:
    _module(scores).reroute(
        _dense(scores),
        _dense(gates),
        bias,
        _dense(topk_ids),
        _dense(topk_weights),
        policy_ids.contiguous(),
        policies,
        similarity,
        out_ids,
        out_weights,
        out_union,
        statistics,
        workspace,
        scoring,
        num_groups,
        top_groups,
        renormalize,
        scale,
        free_slots,
    )


def _run_refine(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, statistics = arguments
    topk_ids, topk_weights = inputs[2], inputs[3]
    out = (
        torch.empty_like(topk_ids, memory_format=torch.contiguous_format),
        torch.empty_like(topk_weights, memory_format=torch.contiguous_format),
        scores.new_empty((scores.shape[-1],), dtype=torch.bool),
    )
    _run_refine_out(
        scores,
        *inputs,
        out_ids=out[0],
        out_weights=out[1],
        out_union=out[2],
        statistics=statistics,
        workspace=_new_workspace(scores),
    )
    return out


def _new_workspace(scores: Tensor) -> Tensor | None:
    needs_one = scores.is_cuda and scores.shape[0] > ONE_LAUNCH_ROWS
    return workspace(scores.device) if needs_one else None
