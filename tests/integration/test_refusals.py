"""Every setting that is refused at start-up, in SGLang's own arguments."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.server_args import ServerArgs

from sglang_moe_routing import demo
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
    "dcp_size": 2,
    "enable_two_batch_overlap": True,
    "enable_single_batch_overlap": True,
    "enable_pdmux": True,
    "enable_waterfill": True,
    "speculative_algorithm": "EAGLE",
    "dllm_algorithm": "LowConfidence",
    "disaggregation_mode": "decode",
    "tokenizer_worker_num": 2,
    "smg_grpc_mode": True,
    "grpc_port": 40000,
    "use_ray": True,
    "enable_deterministic_inference": True,
    "enable_eplb": True,
    "ep_num_redundant_experts": 8,
    "elastic_ep_backend": "mooncake",
    "enable_torch_compile": True,
}
NOT_REFUSED = {"tp_size": 2, "ep_size": 2, "dp_size": 2, "enable_metrics": True, "nnodes": 2}


def arguments(**flags: Any) -> ServerArgs:
    return ServerArgs(model_path=str(demo.MODEL), **flags)


def test_every_refused_flag_is_tried_here() -> None:
    assert set(REFUSED) == set(refusals._FLAGS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_is_named_with_its_value_and_reason(name: str) -> None:
    with pytest.raises(EngineError) as error:
        refusals.refuse_unsupported(arguments(**{name: REFUSED[name]}))
    reason = refusals._FLAGS[name][1]
    assert f"--{name.replace('_', '-')} {REFUSED[name]}: {reason}" in str(error.value)
    assert "unset SGLANG_MOE_ROUTING_CONFIG" in str(error.value)


@pytest.mark.parametrize("name", NOT_REFUSED)
def test_what_is_supported_is_not_refused(name: str) -> None:
    refusals.refuse_unsupported(arguments(**{name: NOT_REFUSED[name]}))


@pytest.mark.parametrize("name", refusals._VARIABLES)
def test_a_refused_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(EngineError, match=f"{name}=true: "):
        refusals.refuse_unsupported(arguments())
