"""The re-routing as torch operators ``sglang_moe_routing::refine`` and ``::fused``.

`refine` takes the engine's choice and re-routes it, for every router. `fused` makes the choice
itself, for routers that rank by plain logits: router logits in, final experts and weights out.
Both write the union U too, and have an ``_out`` form that writes into the caller's tensors. The
``_out`` forms allocate nothing and never synchronise, and what they launch depends on shapes only,
so they are safe under CUDA-graph capture.

The functions below go through torch's dispatcher only while torch compiles: in eager mode it costs
more than the work of a decode batch on a CPU.
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

_TABLE = "Tensor policy_ids, Tensor policies, Tensor similarity"
_REFINE = (
    "Tensor scores, Tensor? gates, Tensor? bias, Tensor topk_ids, Tensor topk_weights, "
    f"{_TABLE}, int scoring, int num_groups, int top_groups, bool renormalize, float scale, "
    "int free_slots"
)
_FUSED = f"Tensor scores, {_TABLE}, int scoring, bool renormalize, float scale, int free_slots"
_OUT = (
    "*, Tensor(a!) out_ids, Tensor(b!) out_weights, Tensor(c!) out_union, "
    "Tensor(d!)? statistics, Tensor(e!)? workspace"
)
_NEW = "Tensor(a!)? statistics) -> (Tensor, Tensor, Tensor)"

_library = torch.library.Library("sglang_moe_routing", "DEF")
for _schema in (
    f"refine_out({_REFINE}, {_OUT}) -> ()",
    f"refine({_REFINE}, {_NEW}",
    f"fused_out({_FUSED}, {_OUT}) -> ()",
    f"fused({_FUSED}, int top_k, {_NEW}",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


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
    if torch.compiler.is_compiling():
        op = torch.ops.sglang_moe_routing.refine.default
        return op(*arguments, statistics)  # type: ignore[no-any-return]
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
    is_compiling = torch.compiler.is_compiling()
    run = torch.ops.sglang_moe_routing.refine_out.default if is_compiling else _run_refine_out
    run(
        *_refine_arguments(
            scores, gates, topk_ids, topk_weights, policy_ids, table, router, free_slots
        ),
        out_ids=out_ids,
        out_weights=out_weights,
        out_union=out_union,
        statistics=statistics,
        workspace=workspace,
    )


def fused(
    logits: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    top_k: int,
    *,
    statistics: Tensor | None = None,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose and re-route in one step.

    Ids are exactly those of a top-k over the logits with ties to the lower id, followed by
    `refine`; weights agree with it to a few units in the last place.

    Args:
        logits: ``[num_tokens, num_experts]``, float32, bfloat16 or float16.
        router: without a bias and without groups.

    Returns:
        ``(topk_ids int32, topk_weights float32, union bool)``. See `refine` for the rest.
    """
    arguments = _fused_arguments(logits, policy_ids, table, router, free_slots)
    if torch.compiler.is_compiling():
        op = torch.ops.sglang_moe_routing.fused.default
        return op(*arguments, top_k, statistics)  # type: ignore[no-any-return]
    return _run_fused(*arguments, top_k, statistics)


def fused_out(
    logits: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    *,
    out_ids: Tensor,
    out_weights: Tensor,
    out_union: Tensor,
    statistics: Tensor | None = None,
    workspace: Tensor | None = None,
    free_slots: FreeSlots = FreeSlots.IGNORED,
) -> None:
    """`fused` into the caller's tensors; see `refine_out`."""
    is_compiling = torch.compiler.is_compiling()
    run = torch.ops.sglang_moe_routing.fused_out.default if is_compiling else _run_fused_out
    run(
        *_fused_arguments(logits, policy_ids, table, router, free_slots),
        out_ids=out_ids,
        out_weights=out_weights,
        out_union=out_union,
        statistics=statistics,
        workspace=workspace,
    )


def workspace(device: torch.device | str) -> Tensor:
    """A new workspace for the ``_out`` forms."""
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


def _fused_arguments(
    logits: Tensor,
    policy_ids: Tensor,
    table: PolicyTable,
    router: Router,
    free_slots: FreeSlots,
) -> tuple[Any, ...]:
    if router.bias is not None or router.num_groups > 1:
        raise KernelError("the fused op chooses for routers without bias and groups only")
    return (
        logits,
        policy_ids,
        table.words,
        table.similarity,
        _SCORINGS[router.scoring],
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
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
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
    out = _empty_like(scores, topk_ids.shape[1], topk_ids.dtype, topk_weights.dtype)
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


def _run_fused_out(
    scores: Tensor,
    policy_ids: Tensor,
    policies: Tensor,
    similarity: Tensor,
    scoring: int,
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
    _run_refine_out(
        scores,
        None,
        None,
        None,
        None,
        policy_ids,
        policies,
        similarity,
        scoring,
        1,
        1,
        renormalize,
        scale,
        free_slots,
        out_ids=out_ids,
        out_weights=out_weights,
        out_union=out_union,
        statistics=statistics,
        workspace=workspace,
    )


def _run_fused(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, top_k, statistics = arguments
    out = _empty_like(scores, top_k, torch.int32, torch.float32)
    _run_fused_out(
        scores,
        *inputs,
        out_ids=out[0],
        out_weights=out[1],
        out_union=out[2],
        statistics=statistics,
        workspace=_new_workspace(scores),
    )
    return out


def _empty_like(
    scores: Tensor, top_k: int, ids: torch.dtype, weights: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = scores.shape[0], scores.shape[-1]
    return (
        scores.new_empty((num_tokens, top_k), dtype=ids),
        scores.new_empty((num_tokens, top_k), dtype=weights),
        scores.new_empty((num_experts,), dtype=torch.bool),
    )


def _new_workspace(scores: Tensor) -> Tensor | None:
    needs_one = scores.is_cuda and scores.shape[0] > ONE_LAUNCH_ROWS
    return workspace(scores.device) if needs_one else None


def _fake_refine(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    topk_ids, topk_weights = arguments[2], arguments[3]
    return _empty_like(scores, topk_ids.shape[1], topk_ids.dtype, topk_weights.dtype)


def _fake_fused(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(scores, arguments[-2], torch.int32, torch.float32)


def _fake_out(*arguments: Any, **outputs: Any) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("refine_out", _run_refine_out, _key)
    _library.impl("refine", _run_refine, _key)
    _library.impl("fused_out", _run_fused_out, _key)
    _library.impl("fused", _run_fused, _key)
torch.library.register_fake("sglang_moe_routing::refine", _fake_refine, lib=_library)
torch.library.register_fake("sglang_moe_routing::fused", _fake_fused, lib=_library)
torch.library.register_fake("sglang_moe_routing::refine_out", _fake_out, lib=_library)
torch.library.register_fake("sglang_moe_routing::fused_out", _fake_out, lib=_library)
