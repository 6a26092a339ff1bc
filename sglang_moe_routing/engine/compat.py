"""Where the supported releases of SGLang differ in what we read of them.

Each function asks for the feature, not for the version. What only an older release needs goes with
it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.topk import TopK, TopKConfig, TopKOutputFormat
from sglang.srt.layers.moe.utils import get_moe_runner_backend

BINDS_RUNNERS = hasattr(TopK, "bind_runner_backend")
"""Whether routers and experts know their runner, as since 0.5.23; before, every forward asks."""

SCALES_PLAIN_WEIGHTS = BINDS_RUNNERS
"""Whether every router applies ``routed_scaling_factor`` also where it does not renormalise; before
0.5.23, some do and others do not."""

DISPATCH_KEEPS_FREE = hasattr(standard, "_map_topk_ids_to_local_experts")
"""Whether an id of -1 stays one where expert parallelism makes ids local, as since 0.5.23; before,
it became the last expert's."""


def num_shared_slots(config: TopKConfig) -> int:
    """Columns of a router's output that hold shared experts, the last ones."""
    if BINDS_RUNNERS:
        return int(config.num_shared_topk_slots)
    return int(config.num_fused_shared_experts)


def router_backend(config: TopKConfig) -> Any:
    """The MoE runner that a router chooses for; None if it has no name."""
    return config.runner_backend if BINDS_RUNNERS else get_moe_runner_backend()


def expert_backend(experts: Any) -> Any:
    """The MoE runner of a layer; None if its method calls its kernels by itself."""
    if BINDS_RUNNERS:
        return experts.runner_backend
    return getattr(experts.runner, "runner_backend", None)


def is_standard(topk: TopK) -> bool:
    """Whether a router hands ids and weights on, instead of leaving the routing to a kernel."""
    chosen = topk.topk_config.output_format
    if chosen is not None or BINDS_RUNNERS:
        return chosen in (None, TopKOutputFormat.STANDARD)
    backend = get_moe_runner_backend()
    return not (
        backend.is_triton_kernels()
        or backend.is_flashinfer_trtllm()
        or backend.is_experimental_sgl_trtllm()
        or (backend.is_flashinfer_mxfp4() and not topk.is_fp4_experts)
    )
