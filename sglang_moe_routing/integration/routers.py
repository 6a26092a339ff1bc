"""SGLang's routers: how they turn logits into experts and weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..engine import compat
from ..errors import EngineError
from ..policies import Router

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
