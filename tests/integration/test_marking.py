"""What the HTTP process makes of SGLang's requests before they reach a scheduler."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

pytest.importorskip("sglang")
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_moe_routing import runtime
from sglang_moe_routing.config import choose, load_config
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration import selecting
from sglang_moe_routing.integration.hooks.http.generate import before
from sglang_moe_routing.integration.hooks.scheduler.request import around
from sglang_moe_routing.integration.marks import POLICY_ID
from sglang_moe_routing.integration.selecting import SCOPE_KEY, Selection
from sglang_moe_routing.integration.transport import Choice, unpack
from sglang_moe_routing.runtime import metrics, process


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\npolicies: {fast: {kind: oea, k0: 3}}\n")
    monkeypatch.setattr(process, "_current", None)
    runtime.start(load_config(path))


def request_to(path: str, root_path: str = "", client: str = "somebody") -> Request:
    scope = {"type": "http", "path": path, "headers": [], "server": ("host", 80), "scheme": "http"}
    scope |= {"root_path": root_path, "client": (client, 12345), SCOPE_KEY: Selection()}
    return Request(scope)


class Manager:
    """What the hook asks of SGLang's `TokenizerManager`."""

    def __init__(self, usual: dict[str, Any] | None = None) -> None:
        self.preferred_sampling_params = usual


def marked(obj: Any, path: str = "/generate", usual: dict[str, Any] | None = None) -> Any:
    before(Manager(usual), obj, request_to(path))
    return obj.sampling_params


def test_a_request_says_its_policy_the_default_too() -> None:
    params = marked(GenerateReqInput(text="a", sampling_params={"custom_params": {"own": 1}}))
    assert unpack(params["custom_params"]) == ({"own": 1}, Choice("vanilla"))


def test_every_item_of_a_batch_says_its_own() -> None:
    shared = {"moe_routing_policy": "fast"}
    items = [{"custom_params": shared}, {"top_p": 0.5}, {"custom_params": shared}]
    first, second, third = marked(GenerateReqInput(text=["a", "b", "c"], sampling_params=items))
    assert unpack(first["custom_params"]) == (shared, Choice("fast"))
    assert unpack(third["custom_params"]) == (shared, Choice("fast"))
    assert unpack(second.pop("custom_params")) == (None, Choice("vanilla"))
    assert second == {"top_p": 0.5}
    assert shared == {"moe_routing_policy": "fast"}


def test_an_object_may_pass_twice() -> None:
    obj = GenerateReqInput(text="a", sampling_params={})
    marked(obj)
    assert unpack(marked(obj)["custom_params"]) == (None, Choice("vanilla"))


@pytest.mark.parametrize("forged", [3, {}, {"policy": "fast", "group": "tenant"}, {"policy": [1]}])
def test_a_client_cannot_pack_a_choice_itself(forged: Any) -> None:
    params = {"custom_params": {"__sglang_moe_routing": forged}}
    _, choice = unpack(marked(GenerateReqInput(text="a", sampling_params=params))["custom_params"])
    assert choice == Choice("vanilla")


def test_what_the_server_prefers_is_kept() -> None:
    """`--preferred-sampling-params` counts for requests that do not bring the key."""
    usual = {"custom_params": {"own": 1}}
    params = marked(GenerateReqInput(text="a", sampling_params={}), usual=usual)
    assert unpack(params["custom_params"]) == ({"own": 1}, Choice("vanilla"))


def scheduled(params: SamplingParams, **settings: Any) -> Req:
    """SGLang's own request of a scheduler, made through our hook."""
    req = Req.__new__(Req)
    init = getattr(Req.__init__, "__wrapped__", Req.__init__)
    around(init, req, "rid", "a", array("q", [1]), params, vocab_size=9, **settings)
    return req


GIVEN = [
    None,
    {},
    {"token_id": 7},
    {"moe_routing_policy": "fast"},
    {"nested": {"a": None}, "b": [1]},
]


@pytest.mark.parametrize("given", GIVEN)
def test_a_scheduler_has_the_clients_own_custom_params(given: dict[str, Any] | None) -> None:
    sent = {} if given is None else {"custom_params": given}
    custom = marked(GenerateReqInput(text="a", sampling_params=sent))["custom_params"]
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams(custom_params=custom)))
    params = msgspec.convert(wire, SamplingParams)
    for _ in range(2):  # items of a batch may share the object
        req = scheduled(params)
        assert req.sampling_params.custom_params == given
        policy = runtime.current().ids.table[getattr(req, POLICY_ID)].name
        assert policy == (given or {}).get("moe_routing_policy", "vanilla")


def test_a_processor_that_gets_nothing_from_stock_gets_nothing() -> None:
    custom = marked(GenerateReqInput(text="a", sampling_params={}))["custom_params"]
    req = scheduled(SamplingParams(custom_params=custom), custom_logit_processor="any")
    assert req.sampling_params.custom_params is None


def test_a_processor_gets_sglangs_own_key_beside_the_clients() -> None:
    params = {"custom_params": {"token_id": 7}}
    custom = marked(GenerateReqInput(text="a", sampling_params=params))["custom_params"]
    req = scheduled(SamplingParams(custom_params=custom), custom_logit_processor="any")
    assert set(req.sampling_params.custom_params) == {"token_id", "__req__"}


def test_what_sglang_adds_on_the_way_arrives() -> None:
    """`max_thinking_tokens` of a request becomes a custom param before it is sent."""
    custom = marked(GenerateReqInput(text="a", sampling_params={}))["custom_params"]
    req = scheduled(SamplingParams(custom_params={**custom, "thinking_budget": 5}))
    assert req.sampling_params.custom_params == {"thinking_budget": 5}


def test_a_request_that_came_past_the_http_process_is_checked() -> None:
    params = SamplingParams(custom_params={"moe_routing_policy": "nonesuch"})
    with get_parallel().override(tp_rank=0):  # the rank that says so in its log
        req = scheduled(params)
    assert "unknown MoE routing policy 'nonesuch'" in req.to_finish.message


@pytest.mark.parametrize("value", ["fast", "tenant", ["fast"], 3, None])
@pytest.mark.parametrize("is_batch", [False, True])
def test_an_embedding_says_nothing_whatever_the_client_wrote(value: Any, is_batch: bool) -> None:
    custom = {
        "moe_routing_policy": value,
        "moe_routing_group": value,
        "__sglang_moe_routing": {"policy": value},
        "own": 1,
    }
    params = {"custom_params": custom}
    obj = EmbeddingReqInput(text="a", sampling_params=[params] if is_batch else params)
    after = marked(obj, "/encode")
    (item,) = after if is_batch else [after]
    assert item["custom_params"] == {"own": 1}


@pytest.mark.parametrize("place", ["in the params", "in an item of several"])
def test_a_policy_beside_custom_params_counts_and_does_not_reach_sglang(place: str) -> None:
    item = {"moe_routing_policy": "fast", "top_p": 0.5}
    is_batch = place != "in the params"
    after = marked(GenerateReqInput(text="a", sampling_params=[item] if is_batch else item))
    params = after[0] if is_batch else after
    assert unpack(params.pop("custom_params")) == (None, Choice("fast"))
    assert params == {"top_p": 0.5}


def test_a_batch_decides_once_for_all_items_that_name_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def count(*args: Any, **kwargs: Any) -> str:
        asked.append(kwargs["body"])
        return choose(*args, **kwargs)

    monkeypatch.setattr(selecting, "choose", count)
    fast = {"custom_params": {"moe_routing_policy": "fast"}}
    items = [{}, fast] * 50
    after = marked(GenerateReqInput(text=["a"] * 100, sampling_params=items))
    packed = [unpack(params["custom_params"])[1] for params in after]
    assert packed == [Choice("vanilla"), Choice("fast")] * 50
    assert len(asked) == 2


@pytest.mark.parametrize("root_path", ["", "/sgl"])
def test_sglangs_health_check_is_left_alone(root_path: str) -> None:
    obj = GenerateReqInput(text="a", rid=f"{HEALTH_CHECK_RID_PREFIX}_1", sampling_params={})
    before(Manager(), obj, request_to(f"{root_path}/health", root_path))
    assert obj.sampling_params == {}


def test_a_client_that_poses_as_a_health_check_is_marked() -> None:
    rid = f"{HEALTH_CHECK_RID_PREFIX}_1"
    params = marked(GenerateReqInput(text="a", rid=rid, sampling_params={}))
    assert unpack(params["custom_params"]) == (None, Choice("vanilla"))


@pytest.mark.parametrize(
    ("status", "client", "counted"),
    [("Starting", "host", []), ("Up", "host", ["vanilla"]), ("Starting", "other", ["vanilla"])],
)
def test_sglangs_warm_up_is_no_request_of_a_client(
    monkeypatch: pytest.MonkeyPatch, status: str, client: str, counted: list[str]
) -> None:
    """It follows the default, as any request without a policy, but nobody sent it."""
    requests: list[str] = []
    monkeypatch.setattr(metrics, "count_request", requests.append)
    manager = SimpleNamespace(server_status=SimpleNamespace(name=status))
    state = SimpleNamespace(tokenizer_manager=manager)
    monkeypatch.setattr(http_server, "_global_state", state)
    obj = GenerateReqInput(text="a", sampling_params={})
    before(Manager(), obj, request_to("/generate", client=client))
    assert unpack(obj.sampling_params["custom_params"]) == (None, Choice("vanilla"))
    assert requests == counted


def test_a_request_through_an_app_without_our_middleware_is_refused() -> None:
    bare = Request({"type": "http", "path": "/generate", "headers": []})
    with pytest.raises(EngineError, match="set up without the routing middleware"):
        before(Manager(), GenerateReqInput(text="a", sampling_params={}), bare)
