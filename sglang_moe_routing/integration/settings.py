"""What each setting of SGLang does to the routing: refused here, handled elsewhere, or nothing.

A setting is allowed because somebody read what it does, not because nobody thought of it. A test
names every flag, and every variable that SGLang's MoE, router, graph and scheduler code reads, that
stands in none of these tables; docs/limits.md shows those that are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import environment
from ..config import BODY_KEY


@dataclass(frozen=True)
class Condition:
    """When a setting is refused: what the documents say, and the test of its resolved value."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Refusal:
    """Why a setting is refused where its condition holds."""

    when: Condition
    reason: str


ON = Condition("on", bool)
GIVEN = Condition("given", bool)
ABOVE_0 = Condition("above 0", lambda number: number > 0)
ABOVE_1 = Condition("above 1", lambda number: number > 1)


def other_than(default: str) -> Condition:
    return Condition(f"other than `{default}`", lambda name: name != default)


def _name_a_policy(params: Any) -> bool:
    given = json.loads(params) if isinstance(params, str) else params
    custom = given.get("custom_params") if isinstance(given, dict) else None
    return any(isinstance(where, dict) and BODY_KEY in where for where in (given, custom))


_OTHER_RANKS = "rows of other ranks would follow unknown policies"
_OTHER_FORWARD = "its kernels replace the model's forward, past the re-routing"
_SPLIT = "a forward is split into parts with their own rows"
_GRPC = "requests over gRPC pass by the choice of a policy"
_FOREIGN_CACHE = "it may find KV without the policy under which that was made"
_SIMULATED = "simulated routing is not the model's routing"

REFUSED_FLAGS: Mapping[str, Refusal] = {
    "enable_dp_attention": Refusal(ON, _OTHER_RANKS),
    "attn_dp_size": Refusal(ABOVE_1, _OTHER_RANKS),
    "moe_dp_size": Refusal(ABOVE_1, _OTHER_RANKS),
    "dwdp_size": Refusal(ABOVE_1, _OTHER_RANKS),
    "pp_size": Refusal(ABOVE_1, "pipeline parallelism is not verified yet"),
    "moe_a2a_backend": Refusal(
        other_than("none"), "rows are sharded before the routing is applied"
    ),
    "attn_cp_size": Refusal(ABOVE_1, "context parallelism shards rows"),
    "enable_prefill_cp": Refusal(ON, "context parallelism shards rows"),
    "dcp_size": Refusal(ABOVE_1, "decode context parallelism is not verified yet"),
    "enable_two_batch_overlap": Refusal(ON, _SPLIT),
    "enable_single_batch_overlap": Refusal(ON, _SPLIT),
    "enable_pdmux": Refusal(ON, "prefill and decode share one forward stream"),
    "enable_waterfill": Refusal(ON, "it rewrites the routing after this package"),
    "enable_nvidia_megakernel": Refusal(ON, _OTHER_FORWARD),
    "enable_amd_monokernel": Refusal(ON, _OTHER_FORWARD),
    "speculative_algorithm": Refusal(GIVEN, "verification rows do not map to requests one to one"),
    "decoupled_spec_role": Refusal(
        other_than("null"), "verification rows do not map to requests one to one"
    ),
    "dllm_algorithm": Refusal(GIVEN, "diffusion models have no decode rows"),
    "disaggregation_mode": Refusal(other_than("null"), "PD disaggregation is not verified yet"),
    "tokenizer_worker_num": Refusal(ABOVE_1, "extra HTTP workers do not load SGLang plugins"),
    "smg_grpc_mode": Refusal(ON, _GRPC),
    "grpc_mode": Refusal(ON, _GRPC),
    "grpc_port": Refusal(GIVEN, _GRPC),
    "sidecar": Refusal(GIVEN, _GRPC),
    "use_ray": Refusal(ON, "schedulers in Ray actors do not load SGLang plugins"),
    "enable_deterministic_inference": Refusal(
        ON, "batch-aware routing makes outputs depend on the batch by design"
    ),
    "enable_eplb": Refusal(ON, "moving experts between ranks is not verified yet"),
    "ep_num_redundant_experts": Refusal(ABOVE_0, "redundant experts are not verified yet"),
    "ep_dispatch_algorithm": Refusal(
        Condition("`fake`", lambda name: name == "fake"),
        "it puts random numbers in the place of the router's",
    ),
    "elastic_ep_backend": Refusal(GIVEN, "elastic expert parallelism is not verified yet"),
    "ep_join_mode": Refusal(GIVEN, "elastic expert parallelism is not verified yet"),
    "enable_elastic_expert_backup": Refusal(ON, "elastic expert parallelism is not verified yet"),
    "enable_torch_compile": Refusal(
        Condition(
            f"on, unless `{environment.EMULATE_GRAPHS}=1`",
            lambda on: bool(on) and os.environ.get(environment.EMULATE_GRAPHS) != "1",
        ),
        "compiled graphs would keep the policy of the step that was traced",
    ),
    "enable_flexkv": Refusal(ON, _FOREIGN_CACHE),
    "radix_cache_backend": Refusal(GIVEN, _FOREIGN_CACHE),
    "preferred_sampling_params": Refusal(
        Condition("they name a `moe_routing_policy`", _name_a_policy),
        "policies are not taken from there; set `default:` in the routing config",
    ),
}

REFUSED_VARIABLES: Mapping[str, Refusal] = {
    "SGLANG_RUST_SERVER": Refusal(ON, "the Rust server does not load SGLang plugins"),
    "SGLANG_SIMULATE_UNIFORM_EXPERTS": Refusal(ON, _SIMULATED),
    "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS": Refusal(ON, _SIMULATED),
    "SGLANG_OPT_LORA_FUSED_TOPK_PACK": Refusal(
        Condition("on, as `SGLANG_EXPERIMENTAL_LORA_OPTI=1` makes it unless it is `0`", bool),
        "packed ids are built before the routing is applied",
    ),
}

_RUNNER = "the expert kernels of a loaded layer are known, or it is refused"
_ROUTER = "routers are read from the loaded model, not from its config"
_COUNTED = "every forward and every captured graph must ask each layer, always equally often"
_GRAPHS = "the capture of decode graphs and the replay of prefill graphs are hooked"
_KV = "a policy's namespace is part of the keys of these caches"

HANDLED_FLAGS: Mapping[str, str] = {
    _RUNNER: """
        moe_runner_backend quantization flashinfer_mxfp4_moe_precision
        enable_fused_moe_sum_all_reduce kt_weight_path kt_method kt_cpuinfer
        kt_threadpool_count kt_num_gpu_experts kt_max_deferred_experts_per_token
        enable_paged_experts paged_experts_num_resident
    """,
    "kernels that add adapters take what their runner takes; LoRA's own runners are refused": """
        enable_lora lora_paths lora_use_virtual_experts experts_shared_outer_loras
    """,
    _ROUTER: """
        json_model_override_args disable_shared_experts_fusion enforce_shared_experts_fusion
        trust_remote_code
    """,
    _COUNTED: """
        model_impl debug_cuda_graph enable_attn_tp_input_scattered
        enable_layernorm_sp enable_megamoe_for_layernorm_sp enable_decoder_swa_bounded_replay
        enable_encoder_swa_bounded_replay
    """,
    _GRAPHS: """
        cuda_graph_config cuda_graph_backend_decode cuda_graph_backend_prefill
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode
        cuda_graph_bs_prefill cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context
        disable_prefill_cuda_graph disable_decode_cuda_graph disable_cuda_graph
        disable_cuda_graph_padding
    """,
    _KV: """
        disable_radix_cache enable_hierarchical_cache hicache_storage_backend enable_lmcache
        enable_unified_cache_external_linker kv_events_config
    """,
    "expert ids are logical where they are re-routed, and mapped afterwards": """
        ep_size init_expert_location
    """,
    "ranks agree on config and artifacts, and decide alike": "tp_size nnodes node_rank",
    "every replica has its own batches": "dp_size load_balance_method",
    "batches mixed with prefill run without the prefill graph": "enable_mixed_chunk",
    "the platform of a model is checked when it is loaded": "device",
    "artifacts are held to the weights that are served": """
        model_path revision download_dir load_format
    """,
    "the row buffer holds the largest batch": """
        chunked_prefill_size max_prefill_tokens context_length
    """,
    "policies are chosen, and reported, on every endpoint": """
        served_model_name fastapi_root_path enable_http2 enable_streaming_session api_key
        admin_api_key enable_custom_logit_processor enable_return_routed_experts enable_metrics
    """,
}

HANDLED_VARIABLES: Mapping[str, str] = {
    _RUNNER: """
        SGLANG_DEEPGEMM_STANDARD_LAYOUT SGLANG_OPT_DG_COMPACT_EAGER SGLANG_OPT_DG_MASKED_M_CAP
        SGLANG_CI_DISABLE_MOE_FUSED_FUNC SGLANG_OPT_USE_JIT_KERNEL_MOE_ALIGN SGLANG_INT4_WEIGHT
        SGLANG_ENABLE_MOE_DEFERRED_FINALIZE SGLANG_MOE_DEFERRED_FINALIZE_MAX_TOKENS
        SGLANG_FLASHINFER_MOE_FUSED_FINALIZE SGLANG_EXPERIMENTAL_LORA_OPTI
        SGLANG_OPT_LORA_FUSED_MERGED_ALIGN SGLANG_OPT_LORA_PREFILL_ROUTING_REUSE
    """,
    _COUNTED: """
        SGLANG_FORCE_FUSED_OP_BACKEND SGLANG_K3_FUSED_FRONT SGLANG_K3_SP_ATTN_RES
        SGLANG_OPT_DEEPGEMM_MEGA_GATE SGLANG_OPT_USE_FUSED_HASH_TOPK SGLANG_OPT_USE_FUSED_GATE_TOPK
    """,
    _GRAPHS: """
        SGLANG_ENABLE_CUDA_GRAPH_DEDUP SGLANG_ENABLE_METADATA_GLUE_GRAPH
        SGLANG_GRAPH_BATCH_CAPTURE SGLANG_ENABLE_CUDA_GRAPH_CAPTURE_TRACE
    """,
    "other platforms are refused": """
        SGLANG_USE_AITER SGLANG_ROCM_SMALLM_ROUTER SGLANG_ROCM_SMALLM_MOE SGLANG_MORI_NO_PAD_MASK
    """,
    "a missing or replaced hook is refused": "SGLANG_PLUGINS",
    "retracted requests keep their policy": """
        SGLANG_TEST_RETRACT SGLANG_TEST_RETRACT_INTERVAL SGLANG_TEST_RETRACT_NO_PREFILL_BS
    """,
}


_NEUTRAL = yaml.safe_load(Path(__file__).with_name("neutral_settings.yaml").read_text())
NEUTRAL_FLAGS: Mapping[str, str] = _NEUTRAL["flags"]
NEUTRAL_VARIABLES: Mapping[str, str] = _NEUTRAL["variables"]


def names(groups: Mapping[str, str]) -> frozenset[str]:
    """The names in a table that lists them by reason."""
    return frozenset(" ".join(groups.values()).split())


FLAGS = frozenset(REFUSED_FLAGS) | names(HANDLED_FLAGS) | names(NEUTRAL_FLAGS)
"""Fields of SGLang's `ServerArgs` of which we know what they do to the routing."""

VARIABLES = frozenset(REFUSED_VARIABLES) | names(HANDLED_VARIABLES) | names(NEUTRAL_VARIABLES)
"""Variables of which we know what they do to the routing."""
