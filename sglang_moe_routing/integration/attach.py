"""Attach to a loaded model: find its routed MoE layers, refuse what bypasses us, build tables."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.layers.moe.topk import TopK

from .. import environment
from ..artifacts import SimilarityArtifact
from ..checkpoint import find_checkpoint, layers_without_experts, read_headers
from ..config import LoadedConfig, RoutingConfig, check_policies, check_torch_policies
from ..cpu.experts import RUNNER
from ..engine import compat
from ..errors import CheckpointError, EngineError, KernelError
from ..kernels import CHOICE, Implementation, beyond_limits, choose
from ..policies import Capacity, Sizes, with_capacity
from ..runtime import Layer, Process, ServedModel, digests
from ..runtime.definitions import make_table
from ..runtime.similarity import check_artifacts, idle_thresholds
from ..runtime.weights import ServedWeights
from . import runners
from .marks import LAYER
from .refusals import replays_decode_steps
from .routers import make_router

Module = TypeVar("Module", TopK, FusedMoE)

logger = logging.getLogger(__name__)


def attach(process: Process, model_runner: Any) -> None:
    """Opt every routed MoE layer of the loaded model in.

    Raises:
        EngineError: the platform is not supported, ranks disagree, or the model has no routed
            layer that we can reach, or one that bypasses us.
        PolicyError: a policy does not fit the model.
        ArtifactError: a similarity artifact does not fit the model.
        KernelError: the compiled kernels cannot be had although they must.
    """
    device = torch.device(model_runner.device)
    _check_platform(device)
    _check_ranks_agree(process)
    server_args = model_runner.server_args
    routed = _routed_layers(model_runner.model)
    _check_experts_have_weights(model_runner.model, server_args)
    sizes = {layer: _sizes(topk, experts) for layer, (topk, experts) in routed.items()}
    weights = ServedWeights.at_start(resolved_view(server_args))
    check_artifacts(process.loaded, process.artifacts, sizes, weights)
    warn_of_policies(process.loaded, process.artifacts, sizes)
    implementation = choose("cuda" if device.type == "cuda" else "cpu")
    if implementation.is_native:
        warn_of_torch_policies(process.loaded)
    has_graphs = replays_decode_steps(server_args)
    layers = [
        _make_layer(process, implementation, has_graphs, index, *modules, device)
        for index, modules in enumerate(routed.values())
    ]
    process.served = ServedModel(
        layers,
        process.ids.table,
        device,
        _max_rows(server_args, model_runner),
        implementation=implementation,
        experts=_describe_experts(routed),
        weights=weights,
        has_graphs=has_graphs,
        num_groups=len(process.config.isolation.groups),
        has_statistics=process.config.statistics,
    )
    for layer, (topk, _) in zip(layers, routed.values(), strict=True):
        setattr(topk.topk_config, LAYER, layer)
    logger.info("MoE re-routing by %s", process.served.kernels)


def _check_platform(device: torch.device) -> None:
    """NVIDIA GPUs and the portable CPU platform; elsewhere other routers or kernels run."""
    if device.type == "cuda" and torch.version.hip is None:
        return
    if device.type == "cpu" and os.environ.get("SGLANG_PLATFORM") == environment.PLATFORM:
        return
    remedy = f"; set SGLANG_PLATFORM={environment.PLATFORM}" if device.type == "cpu" else ""
    name = "rocm" if torch.version.hip else device.type
    raise EngineError(f"routing policies are not supported on this {name} platform{remedy}")


def _check_ranks_agree(process: Process) -> None:
    """Every tensor-parallel rank must decide alike, also across nodes with their own files.

    The main process of each node drew a reload token; those of the first rank's node counts.
    """
    group, mine = get_tp_group(), digests(process.loaded, process.artifacts)
    found = group.all_gather_object((mine, os.environ[environment.RELOAD_TOKEN]))
    os.environ[environment.RELOAD_TOKEN] = found[0][1]
    for rank, (theirs, _) in enumerate(found):
        if theirs != mine:
            raise EngineError(
                f"tensor-parallel rank {rank} has another routing config or artifact than rank "
                f"{group.rank_in_group}: copy {process.loaded.path} and its artifacts to all nodes"
            )


def _routed_layers(model: torch.nn.Module) -> dict[int, tuple[TopK, FusedMoE]]:
    """Router and experts of every MoE layer, by layer id, in layer order."""
    named = list(model.named_modules())
    bypassing = [name for name, m in named if isinstance(m, HashTopK)]
    if bypassing:
        raise EngineError(f"{bypassing[0]}: hash-routed layers have no scores to re-route by")
    biased = [name for name, m in named if _has_bias_per_token(m)]
    if biased:
        raise EngineError(f"{biased[0]}: a router bias that depends on the token is not supported")
    experts = _by_layer(
        (name, m) for name, m in named if isinstance(m, FusedMoE) and not m.is_shared_fused_moe
    )
    routers = _by_layer(
        (name, m) for name, m in named if isinstance(m, TopK) and m.layer_id in experts
    )
    if not experts:
        raise EngineError(f"{type(model).__name__} has no MoE layers that SGLang routes")
    missing = sorted(set(experts) - set(routers))
    if missing:
        raise EngineError(
            f"{type(model).__name__}: MoE layers {missing} do not use SGLang's TopK router; "
            "this model cannot be served with routing policies"
        )
    return {layer: (routers[layer], experts[layer]) for layer in sorted(experts)}


def _by_layer(modules: Iterable[tuple[str, Module]]) -> dict[int, Module]:
    """Modules by layer id. Of two with the same one, the first would be served as it is."""
    found: dict[int, tuple[str, Module]] = {}
    for name, module in modules:
        if module.layer_id in found:
            raise EngineError(
                f"{found[module.layer_id][0]} and {name} both belong to MoE layer "
                f"{module.layer_id}: a layer with several routers or banks of experts cannot be "
                "served with routing policies"
            )
        found[module.layer_id] = name, module
    return {layer: module for layer, (_, module) in found.items()}


def _sizes(topk: TopK, experts: FusedMoE) -> Sizes:
    config = topk.topk_config
    return Sizes(
        top_k=int(config.top_k - compat.num_shared_slots(config)),
        num_experts=int(experts.num_experts - experts.num_fused_shared_experts),
    )


def warn_of_policies(
    loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact], sizes: Mapping[int, Sizes]
) -> None:
    """Hold the policies to the model's layers. Raises `PolicyError`."""
    for doubt in [*check_policies(loaded, sizes), *idle_thresholds(loaded, artifacts)]:
        if get_tp_group().is_first_rank:
            logger.warning("%s: %s", loaded.path, doubt)


def warn_of_torch_policies(loaded: LoadedConfig) -> None:
    """Hold the policies to compiled kernels. Raises `PolicyError`."""
    for price in check_torch_policies(loaded):
        if get_tp_group().is_first_rank:
            logger.warning("%s: %s", loaded.path, price)


def _check_experts_have_weights(model: torch.nn.Module, server_args: Any) -> None:
    """Refuse layers that SGLang made routed though the checkpoint has no experts for them.

    SGLang ignores `decoder_sparse_step` and `mlp_only_layers` of Qwen's configs. Checkpoints that
    cannot be read here, and other names for experts, are not judged.
    """
    if server_args.load_format == "dummy":
        return
    numbers = {
        int(found[1])
        for name, module in model.named_modules()
        if isinstance(module, FusedMoE) and (found := re.search(r"\blayers\.(\d+)\.", name))
    }
    try:
        folder = find_checkpoint(
            server_args.model_path, revision=server_args.revision, cache=server_args.download_dir
        )
        dense = layers_without_experts(read_headers(folder), numbers)
    except CheckpointError:
        return
    if dense:
        raise EngineError(
            f"SGLang made layers {dense} of {type(model).__name__} MoE layers, but "
            f"{server_args.model_path} has no experts for them: their weights would be left as "
            "they were in memory. It ignores decoder_sparse_step and mlp_only_layers of the "
            "model's config.json; serve a model whose layers are all MoE layers"
        )


def _has_bias_per_token(module: torch.nn.Module) -> bool:
    """Multimodal gates (Bailing, DeepSeek-V4) hand TopK a bias per token that no hook sees."""
    return (
        getattr(module, "multi_gate", False) is True
        or getattr(module, "e_score_correction_bias_vl", None) is not None
    )


def _describe_experts(routers: Mapping[int, tuple[TopK, FusedMoE]]) -> str:
    runners = {getattr(experts, RUNNER, None) for _, experts in routers.values()}
    return ", ".join(sorted(runner.name if runner else "sglang" for runner in runners))


def _make_layer(
    process: Process,
    implementation: Implementation,
    has_graphs: bool,
    index: int,
    topk: TopK,
    experts: FusedMoE,
    device: torch.device,
) -> Layer:
    config = topk.topk_config
    where = f"layer {topk.layer_id}"
    if not compat.is_standard(topk):
        raise EngineError(
            f"{where}: MoE runner backend {compat.router_backend(config)} routes inside its "
            "kernel; add --moe-runner-backend triton"
        )
    sizes = _sizes(topk, experts)
    router = make_router(config, where)
    table = make_table(process.ids.table, topk.layer_id, sizes)
    if has_graphs:
        table = with_capacity(table, _capacity(process.config, table.capacity))
    table = table.to(device)
    limit = beyond_limits(router, sizes.num_experts, sizes.top_k)
    if implementation.is_native and limit:  # rather than serve it many times slower unasked
        raise KernelError(
            f"{where}: {limit}. {CHOICE}=torch serves it with plain torch, many times slower"
        )
    return Layer(
        layer_id=topk.layer_id,
        index=index,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        router=router,
        free_slots=runners.free_slots(experts, where),
        table=table,
        has_kernels=implementation.is_native,
        union=torch.zeros(sizes.num_experts, dtype=torch.bool, device=device),
    )


def _capacity(config: RoutingConfig, needed: Capacity) -> Capacity:
    """Captured graphs keep the addresses of a table, so that it cannot grow later.

    It holds what the file needs twice: a reload puts its definitions beside those in force.
    """
    return Capacity(
        policies=max(2 * needed.policies - 1, config.reload.policies),
        steps=max(2 * needed.steps - 1, config.reload.steps),
        matrices=needed.matrices + max(needed.matrices, config.reload.artifacts),
    )


def _max_rows(server_args: Any, model_runner: Any) -> int:
    """Most rows that one forward can have: prefill chunks, or one prompt if not chunked."""
    flags = resolved_view(server_args)
    prefill = (flags.chunked_prefill_size or 0, flags.max_prefill_tokens or 0)
    return int(max(*prefill, 4096) + model_runner.model_config.context_len)
