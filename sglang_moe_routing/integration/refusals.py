"""What this package does not support, refused at start-up with the remedy.

The list mirrors docs/limits.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolved_view

from ..errors import EngineError
from . import environment

_FLAGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "enable_dp_attention": (bool, "rows of other ranks would follow unknown policies"),
    "attn_dp_size": (lambda n: n > 1, "rows of other ranks would follow unknown policies"),
    "moe_dp_size": (lambda n: n > 1, "rows of other ranks would follow unknown policies"),
    "dwdp_size": (lambda n: n > 1, "rows of other ranks would follow unknown policies"),
    "pp_size": (lambda n: n > 1, "pipeline parallelism is not verified yet"),
    "moe_a2a_backend": (
        lambda name: name not in (None, "none"),
        "rows are sharded before the routing is applied",
    ),
    "attn_cp_size": (lambda n: n > 1, "context parallelism shards rows"),
    "dcp_size": (lambda n: n > 1, "decode context parallelism is not verified yet"),
    "enable_two_batch_overlap": (bool, "a forward is split into parts with their own rows"),
    "enable_single_batch_overlap": (bool, "a forward is split into parts with their own rows"),
    "enable_pdmux": (bool, "prefill and decode share one forward stream"),
    "enable_waterfill": (bool, "it rewrites the routing after us"),
    "speculative_algorithm": (bool, "verification rows do not map to requests one to one"),
    "dllm_algorithm": (bool, "diffusion models have no decode rows"),
    "disaggregation_mode": (
        lambda mode: mode not in (None, "null"),
        "PD disaggregation is not verified yet",
    ),
    "tokenizer_worker_num": (lambda n: n > 1, "extra HTTP workers do not load SGLang plugins"),
    "smg_grpc_mode": (bool, "requests over gRPC pass by the choice of a policy"),
    "grpc_port": (bool, "requests over gRPC pass by the choice of a policy"),
    "use_ray": (bool, "schedulers in Ray actors do not load SGLang plugins"),
    "enable_deterministic_inference": (
        bool,
        "batch-aware routing makes outputs depend on the batch by design",
    ),
    "enable_eplb": (bool, "moving experts between ranks is not verified yet"),
    "ep_num_redundant_experts": (bool, "redundant experts are not verified yet"),
    "elastic_ep_backend": (bool, "elastic expert parallelism is not verified yet"),
    "enable_torch_compile": (
        lambda on: on and os.environ.get(environment.EMULATE_GRAPHS) != "1",
        "compiled graphs would keep the policy of the step that was traced",
    ),
}

_VARIABLES: Mapping[str, str] = {
    "SGLANG_RUST_SERVER": "the Rust server does not load SGLang plugins",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS": "simulated routing is not the model's routing",
    "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS": "simulated routing is not the model's routing",
    "SGLANG_OPT_LORA_FUSED_TOPK_PACK": "packed ids are built before the routing is applied",
}


def refuse_unsupported(server_args: Any) -> None:
    """Raise `EngineError` that lists every server flag and variable that we cannot serve with."""
    flags = resolved_view(server_args)
    problems = []
    for name, (is_unsupported, reason) in _FLAGS.items():
        value = getattr(flags, name)
        if value is not None and is_unsupported(value):
            problems.append(f"--{name.replace('_', '-')} {value}: {reason}")
    for name, reason in _VARIABLES.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on"):
            problems.append(f"{name}={os.environ[name]}: {reason}")
    if problems:
        listed = "\n  ".join(problems)
        raise EngineError(
            f"not supported together with MoE routing policies:\n  {listed}\n"
            f"Drop these settings, or unset {environment.CONFIG} to serve without policies"
        )


def refuse_recording_under_graphs(server_args: Any) -> None:
    """Raise `EngineError` if the recorder is on where replayed graphs would run no Python."""
    if os.environ.get(environment.RECORD) and uses_decode_graphs(server_args):
        raise EngineError(
            f"{environment.RECORD} needs eager decoding; "
            "add --cuda-graph-backend-decode disabled, or unset it"
        )


def replays_decode_steps(server_args: Any) -> bool:
    """Whether decode steps replay captured graphs, emulated ones included."""
    return os.environ.get(environment.EMULATE_GRAPHS) == "1" or uses_decode_graphs(server_args)


def uses_decode_graphs(server_args: Any) -> bool:
    """Whether decode steps replay captured device graphs."""
    if os.environ.get(environment.EMULATE_GRAPHS) == "1":
        return False  # the emulation re-executes
    return bool(resolved_view(server_args).cuda_graph_config.decode.backend != "disabled")
