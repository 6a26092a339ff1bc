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
from ..engine import signatures


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
    "enable_lora": Refusal(
        Condition(
            "on, under SGLang 0.5.22",
            lambda on: bool(on) and signatures.installed() == "0.5.22",
        ),
        "what its kernels for adapters do with free slots was not read in that release",
    ),
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

_SERVED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
HANDLED_FLAGS: Mapping[str, str] = _SERVED["handled"]["flags"]
HANDLED_VARIABLES: Mapping[str, str] = _SERVED["handled"]["variables"]
NEUTRAL_FLAGS: Mapping[str, str] = _SERVED["neutral"]["flags"]
NEUTRAL_VARIABLES: Mapping[str, str] = _SERVED["neutral"]["variables"]


def names(groups: Mapping[str, str]) -> frozenset[str]:
    """The names in a table that lists them by reason."""
    return frozenset(" ".join(groups.values()).split())


FLAGS = frozenset(REFUSED_FLAGS) | names(HANDLED_FLAGS) | names(NEUTRAL_FLAGS)
"""Fields of SGLang's `ServerArgs` of which we know what they do to the routing."""

VARIABLES = frozenset(REFUSED_VARIABLES) | names(HANDLED_VARIABLES) | names(NEUTRAL_VARIABLES)
"""Variables of which we know what they do to the routing."""
