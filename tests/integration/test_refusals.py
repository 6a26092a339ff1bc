"""Every setting that is refused at start-up, in SGLang's own arguments."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.server_args import ServerArgs

from sglang_moe_routing import demo
from sglang_moe_routing.engine import signatures
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration import refusals

REFUSED: dict[str, Any] = {
    "enable_dp_attention": True,
    "attn_dp_size": 2,
    "moe_dp_size": 2,
    "dwdp_size": 2,
    "pp_size": 2,
    "moe_a2a_backend": "deepep",
    "attn_cp_size": 2,
    "enable_prefill_cp": True,
    "dcp_size": 2,
    "enable_two_batch_overlap": True,
    "enable_single_batch_overlap": True,
    "enable_pdmux": True,
    "enable_waterfill": True,
    "enable_nvidia_megakernel": True,
    "enable_amd_monokernel": True,
    "speculative_algorithm": "EAGLE",
    "decoupled_spec_role": "verifier",
    "dllm_algorithm": "LowConfidence",
    "disaggregation_mode": "decode",
    "tokenizer_worker_num": 2,
    "smg_grpc_mode": True,
    "grpc_mode": True,
    "grpc_port": 40000,
    "sidecar": "some.module",
    "use_ray": True,
    "enable_deterministic_inference": True,
    "enable_eplb": True,
    "ep_num_redundant_experts": 8,
    "ep_dispatch_algorithm": "fake",
    "elastic_ep_backend": "mooncake",
    "ep_join_mode": "recover",
    "enable_elastic_expert_backup": True,
    "enable_torch_compile": True,
    "enable_flexkv": True,
    "radix_cache_backend": "flexkv",
    "preferred_sampling_params": '{"custom_params": {"moe_routing_policy": "fast"}}',
}
NOT_REFUSED = {
    "tp_size": 2,
    "ep_size": 2,
    "dp_size": 2,
    "enable_metrics": True,
    "nnodes": 2,
    "ep_dispatch_algorithm": "static",
    "enable_hierarchical_cache": True,
    "preferred_sampling_params": '{"stop": "moe_routing_policy", "custom_params": {"own": 1}}',
    "json_model_override_args": '{"num_experts_per_tok": 4}',
}


def arguments(**flags: Any) -> ServerArgs:
    return ServerArgs(model_path=str(demo.MODEL), **flags)


def test_every_refused_flag_is_tried_here() -> None:
    from sglang_moe_routing.integration import settings

    assert {*REFUSED, "enable_lora"} == set(settings.REFUSED_FLAGS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_is_named_with_its_value(name: str) -> None:
    with pytest.raises(EngineError) as error:
        refusals.refuse_unsupported(arguments(**{name: REFUSED[name]}))
    assert f"--{name.replace('_', '-')} {REFUSED[name]}: " in str(error.value)
    assert "unset SGLANG_MOE_ROUTING_CONFIG" in str(error.value)


@pytest.mark.parametrize("name", NOT_REFUSED)
def test_what_is_supported_is_not_refused(name: str) -> None:
    refusals.refuse_unsupported(arguments(**{name: NOT_REFUSED[name]}))


@pytest.mark.parametrize("release", ["0.5.22", "0.5.23"])
def test_adapters_are_refused_in_the_release_in_which_they_were_not_read(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signatures, "installed", lambda: release)
    if release != "0.5.22":
        refusals.refuse_unsupported(arguments(enable_lora=True))
        return
    with pytest.raises(EngineError, match="--enable-lora True: what its kernels for adapters do"):
        refusals.refuse_unsupported(arguments(enable_lora=True))


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_RUST_SERVER",
        "SGLANG_SIMULATE_UNIFORM_EXPERTS",
        "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS",
    ],
)
def test_a_refused_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(EngineError, match=f"{name}=true: "):
        refusals.refuse_unsupported(arguments())


PACK = "SGLANG_OPT_LORA_FUSED_TOPK_PACK"


@pytest.mark.parametrize("value", [None, "1", "on"])
def test_a_variable_that_another_turns_on_is_refused(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_LORA_OPTI", "1")
    if value is not None:
        monkeypatch.setenv(PACK, value)
    with pytest.raises(EngineError, match=f"{PACK}={value or True}: packed ids are built before"):
        refusals.refuse_unsupported(arguments())


@pytest.mark.parametrize(("opti", "pack"), [("1", "0"), ("0", "1")])
def test_a_variable_that_sglang_ignores_is_not_refused(
    opti: str, pack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_LORA_OPTI", opti)
    monkeypatch.setenv(PACK, pack)
    refusals.refuse_unsupported(arguments())


class Newer(ServerArgs, dict=True):  # type: ignore[misc]  # sglang is untyped
    """SGLang's flags with one that this package has not heard of."""

    enable_shiny_router: bool = False


@pytest.mark.parametrize("is_on", [False, True])
def test_a_flag_that_nobody_has_read_passes_at_its_default_only(is_on: bool) -> None:
    flags = Newer(model_path=str(demo.MODEL), enable_shiny_router=is_on)
    if not is_on:
        refusals.refuse_unsupported(flags)
        return
    with pytest.raises(
        EngineError, match=r"--enable-shiny-router True: this package does not know"
    ):
        refusals.refuse_unsupported(flags)
