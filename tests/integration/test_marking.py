"""What the HTTP process makes of SGLang's requests before they reach a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

pytest.importorskip("sglang")
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration import runtime
from sglang_moe_routing.integration.hooks.generate import before
from sglang_moe_routing.integration.selecting import SCOPE_KEY, Selection


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\npolicies: {fast: {kind: oea, k0: 3}}\n")
    monkeypatch.setattr(runtime, "_runtime", None)
    runtime.start(load_config(path))


def request_to(path: str, root_path: str = "") -> Request:
    scope = {"type": "http", "path": path, "headers": [], "server": ("host", 80), "scheme": "http"}
    return Request({**scope, "root_path": root_path, SCOPE_KEY: Selection()})


def marked(obj: Any, path: str = "/generate") -> Any:
    before(None, obj, request_to(path))
    return obj.sampling_params


def test_a_request_says_its_policy_the_default_too() -> None:
    params = marked(GenerateReqInput(text="a", sampling_params={"custom_params": {"own": 1}}))
    assert params["custom_params"] == {"own": 1, "moe_routing_policy": "vanilla"}


def test_every_item_of_a_batch_says_its_own() -> None:
    items = [{"custom_params": {"moe_routing_policy": "fast"}}, {"top_p": 0.5}]
    first, second = marked(GenerateReqInput(text=["a", "b"], sampling_params=items))
    assert first["custom_params"] == {"moe_routing_policy": "fast"}
    assert second == {"top_p": 0.5, "custom_params": {"moe_routing_policy": "vanilla"}}


@pytest.mark.parametrize("value", ["fast", "tenant", ["fast"], 3, None])
@pytest.mark.parametrize("is_batch", [False, True])
def test_an_embedding_says_nothing_whatever_the_client_wrote(value: Any, is_batch: bool) -> None:
    custom = {"moe_routing_policy": value, "moe_routing_group": value, "own": 1}
    params = {"custom_params": custom}
    obj = EmbeddingReqInput(text="a", sampling_params=[params] if is_batch else params)
    after = marked(obj, "/encode")
    (item,) = after if is_batch else [after]
    assert item["custom_params"] == {"own": 1}


@pytest.mark.parametrize("root_path", ["", "/sgl"])
def test_sglangs_health_check_is_left_alone(root_path: str) -> None:
    obj = GenerateReqInput(text="a", rid=f"{HEALTH_CHECK_RID_PREFIX}_1", sampling_params={})
    before(None, obj, request_to(f"{root_path}/health", root_path))
    assert obj.sampling_params == {}


def test_a_client_that_poses_as_a_health_check_is_marked() -> None:
    rid = f"{HEALTH_CHECK_RID_PREFIX}_1"
    params = marked(GenerateReqInput(text="a", rid=rid, sampling_params={}))
    assert params["custom_params"] == {"moe_routing_policy": "vanilla"}


def test_a_request_through_an_app_without_our_middleware_is_refused() -> None:
    bare = Request({"type": "http", "path": "/generate", "headers": []})
    with pytest.raises(EngineError, match="set up without the routing middleware"):
        before(None, GenerateReqInput(text="a", sampling_params={}), bare)
