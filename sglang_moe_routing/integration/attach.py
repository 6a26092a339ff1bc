"""Attach to a loaded model: find its routed MoE layers, refuse what bypasses us, build tables."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
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
from ..config import LoadedConfig, check_policies, check_torch_policies
from ..cpu.experts import RUNNER
from ..engine import compat
from ..errors import ArtifactError, CheckpointError, EngineError, KernelError
from ..kernels import CHOICE, REFERENCE, Implementation, beyond_limits, choose, written_in_torch
from ..policies import Capacity, PolicyTable, Router, Sizes, build_table, with_capacity
from ..runtime import Runtime
from ..runtime.definitions import Definition
from ..runtime.plan import Layer
from ..runtime.similarity import idle_thresholds
from ..runtime.weights import ServedWeights, check_weights
from . import runners
from .marks import LAYER
from .refusals import replays_decode_steps

Module = TypeVar("Module", TopK, FusedMoE)

logger = logging.getLogger(__name__)


def attach(runtime: Runtime, model_runner: Any) -> None:
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
    _check_ranks_agree(runtime)
    server_args = model_runner.server_args
    routers = _routed_layers(model_runner.model)
    _check_experts_have_weights(model_runner.model, server_args)
    sizes = {layer: _sizes(topk, experts) for layer, (topk, experts) in routers.items()}
    num_experts = {layer: size.num_experts for layer, size in sizes.items()}
    runtime.weights = ServedWeights.at_start(resolved_view(server_args))
    check_artifacts(runtime.loaded, runtime.artifacts, num_experts, runtime.weights)
    warn_of_policies(runtime.loaded, runtime.artifacts, sizes)
    implementation = choose("cuda" if device.type == "cuda" else "cpu")
    if implementation.is_native:
        warn_of_torch_policies(runtime.loaded)
    runtime.has_graphs = replays_decode_steps(server_args)
    layers = []
    for index, (topk, experts) in enumerate(routers.values()):
        layer = _make_layer(runtime, implementation, index, topk, experts, device)
        setattr(topk.topk_config, LAYER, layer)
        layers.append(layer)
    runtime.kernels = describe_kernels(implementation, layers)
    runtime.experts = _describe_experts(routers)
    logger.info("MoE re-routing by %s", runtime.kernels)
    runtime.attach(layers, device, _max_rows(server_args, model_runner))


def _check_platform(device: torch.device) -> None:
    """NVIDIA GPUs and the portable CPU platform; elsewhere other routers or kernels run."""
    if device.type == "cuda" and torch.version.hip is None:
        return
    if device.type == "cpu" and os.environ.get("SGLANG_PLATFORM") == environment.PLATFORM:
        return
    remedy = f"; set SGLANG_PLATFORM={environment.PLATFORM}" if device.type == "cpu" else ""
    name = "rocm" if torch.version.hip else device.type
    raise EngineError(f"routing policies are not supported on this {name} platform{remedy}")


def _check_ranks_agree(runtime: Runtime) -> None:
    """Every tensor-parallel rank must decide alike, also across nodes with their own files.

    The main process of each node drew a reload token; those of the first rank's node counts.
    """
    group, mine = get_tp_group(), digests(runtime.loaded, runtime.artifacts)
    found = group.all_gather_object((mine, os.environ[environment.RELOAD_TOKEN]))
    os.environ[environment.RELOAD_TOKEN] = found[0][1]
    for rank, (theirs, _) in enumerate(found):
        if theirs != mine:
            raise EngineError(
                f"tensor-parallel rank {rank} has another routing config or artifact than rank "
                f"{group.rank_in_group}: copy {runtime.loaded.path} and its artifacts to all nodes"
            )


def digests(loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact]) -> list[str]:
    """What decides about the routing, to be compared between ranks."""
    return [loaded.sha256, *(artifact.sha256 for artifact in artifacts.values())]


def _routed_layers(model: torch.nn.Module) -> dict[int, tuple[TopK, FusedMoE]]:
    """Router and experts of every MoE layer, by layer id, in layer order."""
    bypassing = [name for name, m in model.named_modules() if isinstance(m, HashTopK)]
    if bypassing:
        raise EngineError(f"{bypassing[0]}: hash-routed layers have no scores to re-route by")
    biased = [name for name, m in model.named_modules() if _has_bias_per_token(m)]
    if biased:
        raise EngineError(f"{biased[0]}: a router bias that depends on the token is not supported")
    experts = _by_layer(
        {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, FusedMoE) and not m.is_shared_fused_moe
        }
    )
    routers = _by_layer(
        {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, TopK) and m.layer_id in experts
        }
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


def _by_layer(modules: Mapping[str, Module]) -> dict[int, Module]:
    """Modules by layer id. Of two with the same one, the first would be served as it is."""
    found: dict[int, tuple[str, Module]] = {}
    for name, module in modules.items():
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


def describe_kernels(implementation: Implementation, layers: Sequence[Layer]) -> str:
    """What re-routes `layers`, and if that is the reference, why."""
    if all(layer.uses_kernels for layer in layers):
        return implementation.name
    if not implementation.is_native:
        return f"{REFERENCE}: {implementation.reason}"
    layer = next(layer for layer in layers if not layer.uses_kernels)
    return f"{REFERENCE}: {written_in_torch(layer.table)}"


def _describe_experts(routers: Mapping[int, tuple[TopK, FusedMoE]]) -> str:
    runners = {getattr(experts, RUNNER, None) for _, experts in routers.values()}
    return ", ".join(sorted(runner.name if runner else "sglang" for runner in runners))


def _make_layer(
    runtime: Runtime,
    implementation: Implementation,
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
    top_k, num_experts = sizes.top_k, sizes.num_experts
    router = make_router(config, where)
    table = make_table(runtime.ids.table, topk.layer_id, sizes)
    if runtime.has_graphs:
        table = with_capacity(table, _capacity(runtime, table.capacity))
    table = table.to(device)
    if implementation.is_native:
        _check_kernels(beyond_limits(router, num_experts, top_k), where)
    return Layer(
        layer_id=topk.layer_id,
        index=index,
        num_experts=num_experts,
        top_k=top_k,
        router=router,
        free_slots=runners.free_slots(experts, where),
        table=table,
        has_kernels=implementation.is_native,
        union=torch.zeros(num_experts, dtype=torch.bool, device=device),
    )


def _check_kernels(limit: str, where: str) -> None:
    """Refuse a layer that the kernels cannot hold, rather than serve it many times slower."""
    if limit:
        raise KernelError(
            f"{where}: {limit}. {CHOICE}=torch serves it with plain torch, many times slower"
        )


def make_table(definitions: Sequence[Definition], layer_id: int, sizes: Sizes) -> PolicyTable:
    """The policies of one layer, on the host; the place of a definition is its policy id."""
    artifacts = {d.artifact.sha256: d.artifact for d in definitions if d.artifact}
    return build_table(
        [d.policy for d in definitions],
        layer=layer_id,
        top_k=sizes.top_k,
        num_experts=sizes.num_experts,
        similarity={digest: a.matrices[layer_id] for digest, a in artifacts.items()},
        coefficients={
            digest: a.coefficients[layer_id] for digest, a in artifacts.items() if a.coefficients
        },
        artifacts=[d.artifact.sha256 if d.artifact else None for d in definitions],
    )


def _capacity(runtime: Runtime, needed: Capacity) -> Capacity:
    """Captured graphs keep the addresses of a table, so that it cannot grow later.

    It holds what the file needs twice: a reload puts its definitions beside those in force.
    """
    reload = runtime.config.reload
    return Capacity(
        policies=max(2 * needed.policies - 1, reload.policies),
        steps=max(2 * needed.steps - 1, reload.steps),
        matrices=needed.matrices + max(needed.matrices, reload.artifacts),
    )


KNOWN_ROUTER_SETTINGS = frozenset(
    {
        # read or refused where routers and layers are made
        *("top_k", "use_grouped_topk", "topk_group", "num_expert_group", "renormalize"),
        *("shared_experts", "num_fused_shared_experts"),
        *("custom_routing_function", "correction_bias", "scoring_func"),
        *("routed_scaling_factor", "apply_routed_scaling_factor_on_output"),
        *("output_format", "runner_backend", "fused_gate_packed_ids"),
        # other code for the same function of the logits
        *("torch_native", "sqrtsoftplus_log1p"),
        # matters after the re-routing only
        *("fused_shared_experts_scaling_factor", "routing_method_type"),
        *("allow_routed_experts_capture", "layer_id"),
        *("_correction_bias_dtype_cache", "_correction_bias_cache_key"),
    }
)
"""Fields of SGLang's `TopKConfig` of which we know what they do to the routing."""


def make_router(config: Any, where: str) -> Router:
    """How SGLang's `TopKConfig` turns logits into experts and weights.

    Raises:
        EngineError: a kind of router whose scores we cannot recompute.
    """
    _refuse_unknown_settings(config, where)
    backend = compat.router_backend(config)
    problems = {
        "a custom routing function": config.custom_routing_function is not None,
        "packed expert ids": config.fused_gate_packed_ids,
        "raw logits as weights": (
            backend is not None
            and backend.is_flashinfer_trtllm_routed()
            and not config.renormalize
            and not config.use_grouped_topk
        ),
        "a scale on weights that are not renormalised": (
            config.apply_routed_scaling_factor_on_output
            and not config.renormalize
            and not compat.SCALES_PLAIN_WEIGHTS
        ),
        "softmax with a correction bias": (
            config.scoring_func == "softmax"
            and config.correction_bias is not None
            and not config.use_grouped_topk
        ),
        f"scoring function {config.scoring_func!r}": (
            config.scoring_func not in ("softmax", "sigmoid", "sqrtsoftplus")
        ),
    }
    for problem, is_present in problems.items():
        if is_present:
            raise EngineError(f"{where}: routers with {problem} are not supported")
    has_groups = config.use_grouped_topk and config.num_expert_group > 1
    scales_output = config.apply_routed_scaling_factor_on_output
    return Router(
        # SGLang's biased grouped router is sigmoid whatever scoring_func says
        scoring=(
            "sigmoid"
            if config.use_grouped_topk and config.correction_bias is not None
            else config.scoring_func
        ),
        renormalize=config.renormalize,
        scale=config.routed_scaling_factor or 1.0 if scales_output else 1.0,
        bias=config.correction_bias,
        num_groups=config.num_expert_group if has_groups else 1,
        top_groups=config.topk_group if has_groups else 1,
    )


def _refuse_unknown_settings(config: Any, where: str) -> None:
    """Settings of a changed SGLang: nobody has read what they do, so only their defaults pass."""
    unknown = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in KNOWN_ROUTER_SETTINGS
        and getattr(config, field.name) is not field.default
        and getattr(config, field.name) != field.default
    ]
    if unknown:
        raise EngineError(
            f"{where}: this package does not know what these settings of SGLang's router do: "
            + ", ".join(unknown)
        )


def check_artifacts(
    loaded: LoadedConfig,
    artifacts: Mapping[str, SimilarityArtifact],
    num_experts: Mapping[int, int],
    weights: ServedWeights,
) -> None:
    """Hold the artifacts of a config to the served model.

    Args:
        num_experts: routed experts by layer id.
        weights: those of the model.

    Raises:
        ArtifactError: an artifact does not fit.
    """
    for name, artifact in artifacts.items():
        _check_layers(name, artifact, num_experts)
    check_weights(loaded, artifacts, weights)


def _check_layers(name: str, artifact: SimilarityArtifact, num_experts: Mapping[int, int]) -> None:
    where = f"similarity artifact {name!r}"
    missing = sorted(set(num_experts) - set(artifact.layers))
    if missing:
        raise ArtifactError(
            f"{where} has no matrix for MoE layers {missing} of this model; it has layers "
            f"{artifact.layers} (made for {artifact.model or 'an unnamed model'})"
        )
    for layer, expected in num_experts.items():
        if artifact.matrices[layer].shape[0] != expected:
            raise ArtifactError(
                f"{where} is for {artifact.matrices[layer].shape[0]} experts, but layer {layer} "
                f"of this model has {expected} (made for {artifact.model or 'an unnamed model'})"
            )


def _max_rows(server_args: Any, model_runner: Any) -> int:
    """Most rows that one forward can have: prefill chunks, or one prompt if not chunked."""
    flags = resolved_view(server_args)
    prefill = (flags.chunked_prefill_size or 0, flags.max_prefill_tokens or 0)
    return int(max(*prefill, 4096) + model_runner.model_config.context_len)
