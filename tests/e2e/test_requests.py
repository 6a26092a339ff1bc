"""Every way to pick a policy, on every endpoint, through real requests."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import httpx
import openai
import pytest
from packaging.version import Version
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from tests.endpoints import GENERATES as ENDPOINTS
from tests.endpoints import MESSAGES, OTHER_MODELS

from .conftest import HEADER, Running

AVAILABLE = (
    "vanilla, oea-k3, oea-k2, topk-k3, sere-s2, late, everywhere, same-as-oea-k3, budget-20, "
    "xshare-24, lynx-24, mapped"
)
HAS_CHAT = Version(version("sglang")) >= Version("0.5.23")
"""Older releases answer /api/chat with 500, with or without this package: they take what the chat
template of transformers 5 returns for a list."""
ANSWERING = [path for path in ENDPOINTS if path != "/api/chat" or HAS_CHAT]


@pytest.fixture
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def body_policy(name: object) -> dict[str, Any]:
    return {"custom_params": {"moe_routing_policy": name}}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_header_picks_the_policy_of_a_chat(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=MESSAGES, max_tokens=4, extra_headers={HEADER: "oea-k3"}
    )
    assert raw.headers[HEADER] == "oea-k3"
    assert raw.parse().metadata["moe_routing_policy"] == "oea-k3"


def test_request_without_a_policy_gets_the_default(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="demo", prompt="The", max_tokens=2)
    assert raw.headers[HEADER] == "vanilla"
    assert raw.parse().metadata["moe_routing_policy"] == "vanilla"


def test_body_field_picks_the_policy(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=MESSAGES, max_tokens=2, extra_body=body_policy("topk-k3")
    )
    assert raw.headers[HEADER] == "topk-k3"


def test_model_alias_picks_the_policy(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo@sere-s2", messages=MESSAGES, max_tokens=2
    )
    assert raw.headers[HEADER] == "sere-s2"
    assert raw.parse().model == "demo"


def test_agreeing_sources_are_fine(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo@oea-k3",
        messages=MESSAGES,
        max_tokens=2,
        extra_headers={HEADER: "oea-k3"},
        extra_body=body_policy("oea-k3"),
    )
    assert raw.headers[HEADER] == "oea-k3"


def test_streaming_chat_says_the_policy_in_its_header(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=4,
        stream=True,
        extra_headers={HEADER: "oea-k3"},
    )
    assert raw.headers[HEADER] == "oea-k3"
    assert len(list(raw.parse())) >= 2


def test_several_answers_and_several_prompts(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="demo",
        prompt=["The first", "The second"],
        n=2,
        max_tokens=3,
        temperature=1.0,
        extra_headers={HEADER: "oea-k3"},
    )
    assert raw.headers[HEADER] == "oea-k3"
    assert len(raw.parse().choices) == 4


def test_generate_says_the_policy_in_meta_info(served: Running) -> None:
    body = {"text": "The", "sampling_params": {"max_new_tokens": 2}}
    response = served.http.post("/generate", json=body, headers={HEADER: "oea-k3"})
    assert response.headers[HEADER] == "oea-k3"
    assert response.json()["meta_info"]["moe_routing_policy"] == "oea-k3"


def test_streaming_generate_says_it_in_every_event(served: Running) -> None:
    body = {"text": "The", "sampling_params": {"max_new_tokens": 3}, "stream": True}
    response = served.http.post("/generate", json=body, headers={HEADER: "oea-k3"})
    assert response.headers[HEADER] == "oea-k3"
    policies = {event["meta_info"]["moe_routing_policy"] for event in events(response)}
    assert policies == {"oea-k3"}


def test_items_of_a_batch_may_differ(served: Running) -> None:
    items = [{"max_new_tokens": 2, **body_policy("oea-k3")}, {"max_new_tokens": 2}]
    body = {"text": ["The", "And"], "sampling_params": items}
    response = served.http.post("/generate", json=body)
    assert response.headers[HEADER] == "oea-k3, vanilla"
    applied = [item["meta_info"]["moe_routing_policy"] for item in response.json()]
    assert applied == ["oea-k3", "vanilla"]


def test_parallel_samples_of_generate_keep_the_policy(served: Running) -> None:
    body = {"text": ["The", "And"], "sampling_params": {"max_new_tokens": 2, "n": 3}}
    response = served.http.post("/generate", json=body, headers={HEADER: "sere-s2"})
    applied = [item["meta_info"]["moe_routing_policy"] for item in response.json()]
    assert applied == ["sere-s2"] * 6


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ANSWERING)
def test_every_endpoint_answers_with_the_applied_policy(
    served: Running, path: str, stream: bool
) -> None:
    body = {**ENDPOINTS[path], "stream": stream}
    response = served.http.post(path, json=body, headers={HEADER: "oea-k3"})
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == "oea-k3"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", ["no-such", "private", "two words", ""])
def test_every_endpoint_refuses_a_bad_header_with_400(
    served: Running, path: str, stream: bool, name: str
) -> None:
    body = {**ENDPOINTS[path], "stream": stream}
    response = served.http.post(path, json=body, headers={HEADER: name})
    assert response.status_code == 400, response.text
    answer = response.json()
    message = answer.get("message") or answer["error"]["message"]
    assert repr(name) in message
    assert HEADER in message
    assert message.endswith(f"available: {AVAILABLE}")
    assert HEADER not in response.headers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("value", ["no-such", "private", 7, ["oea-k3"], ""])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_body_field_is_a_400(served: Running, path: str, value: object, stream: bool) -> None:
    body = {**ENDPOINTS[path], **body_policy(value), "stream": stream}
    response = served.http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert repr(value) in response.json()["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_body_field_of_generate_is_a_400(served: Running, stream: bool) -> None:
    params = {"max_new_tokens": 2, **body_policy("no-such")}
    body = {"text": "The", "sampling_params": params, "stream": stream}
    response = served.http.post("/generate", json=body)
    assert response.status_code == 400, response.text
    assert "no-such" in response.json()["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
def test_bad_alias_is_a_400(served: Running, path: str) -> None:
    response = served.http.post(path, json={**ENDPOINTS[path], "model": "demo@no-such"})
    assert response.status_code == 400, response.text
    assert "no-such" in response.text


def test_contradiction_is_a_400_that_names_both(served: Running) -> None:
    body = {**ENDPOINTS["/v1/completions"], **body_policy("vanilla")}
    response = served.http.post("/v1/completions", json=body, headers={HEADER: "oea-k3"})
    assert response.status_code == 400
    assert "says 'oea-k3'" in response.json()["message"]
    assert "says 'vanilla'" in response.json()["message"]


WAYS: dict[str, Any] = {
    "field": lambda name: {"moe_routing_policy": name},
    "custom_params": body_policy,
    "alias": lambda name: {"model": f"demo@{name}"},
    "alias of a mistyped model": lambda name: {"model": f"Demo@{name}"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ANSWERING)
def test_every_endpoint_honours_every_way_in_its_body(served: Running, path: str, way: str) -> None:
    def send(name: str) -> httpx.Response:
        return served.http.post(path, json={**ENDPOINTS[path], **WAYS[way](name)})

    is_strict = path == "/v1/responses" and "mistyped" in way  # knows the served model only
    response = send("oea-k3")
    expected = (404, None) if is_strict else (200, "oea-k3")
    assert (response.status_code, response.headers.get(HEADER)) == expected, response.text
    response = send("no-such")
    assert (response.status_code, response.headers.get(HEADER)) == (400, None), response.text
    assert "unknown MoE routing policy 'no-such'" in response.text


VERTEX: dict[str, Any] = {
    "an instance": lambda name: {"instances": [{"text": "The", "moe_routing_policy": name}] * 2},
    "parameters": lambda name: {"parameters": {"moe_routing_policy": name}},
    "custom_params of parameters": lambda name: {"parameters": body_policy(name)},
    "sampling_params": lambda name: {"parameters": {"sampling_params": body_policy(name)}},
}


@pytest.mark.parametrize("place", VERTEX)
def test_vertex_takes_a_policy_wherever_its_own_fields_are(served: Running, place: str) -> None:
    def send(name: str) -> httpx.Response:
        body = {"instances": [{"text": "The"}], "parameters": {}, **VERTEX[place](name)}
        body["parameters"].setdefault("sampling_params", {})["max_new_tokens"] = 2
        return served.http.post("/vertex_generate", json=body)

    response = send("oea-k3")
    assert (response.status_code, response.headers.get(HEADER)) == (200, "oea-k3"), response.text
    response = send("no-such")
    assert response.status_code == 400, response.text
    assert "unknown MoE routing policy 'no-such'" in response.text


def test_instances_of_vertex_that_differ_are_a_400(served: Running) -> None:
    instances = [{"text": "The", "moe_routing_policy": name} for name in ("oea-k3", "vanilla")]
    response = served.http.post("/vertex_generate", json={"instances": instances})
    assert response.status_code == 400, response.text
    assert "contradictory" in response.text


@pytest.mark.parametrize("model", ["gpt@latest", "org/demo@main"])
def test_a_foreign_model_name_with_an_at_sign_is_served(served: Running, model: str) -> None:
    response = served.http.post(
        "/v1/completions", json={**ENDPOINTS["/v1/completions"], "model": model}
    )
    assert (response.status_code, response.headers.get(HEADER)) == (200, "vanilla"), response.text
    assert response.json()["model"] == model


@pytest.mark.parametrize("path", [path for path in ANSWERING if path.startswith("/api/")])
def test_a_property_of_a_schema_is_no_choice(served: Running, path: str) -> None:
    schema = {"type": "object", "properties": {"moe_routing_policy": {"type": "string"}}}
    response = served.http.post(path, json={**ENDPOINTS[path], "format": schema})
    assert (response.status_code, response.headers.get(HEADER)) == (200, "vanilla"), response.text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", OTHER_MODELS)
def test_endpoints_for_other_models_refuse_an_unknown_policy(
    served: Running, path: str, way: str
) -> None:
    response = served.http.post(path, json={**OTHER_MODELS[path], **WAYS[way]("no-such")})
    assert response.status_code == 400, response.text
    is_strict = path == "/v1/decisions" and "alias" not in way  # knows its fields only
    assert ("Extra inputs" if is_strict else "policy 'no-such'") in response.text


def test_header_given_twice_counts_once_if_both_agree(served: Running) -> None:
    def send(*names: str) -> httpx.Response:
        headers = [(HEADER, name) for name in names]
        return served.http.post(
            "/v1/completions", json=ENDPOINTS["/v1/completions"], headers=headers
        )

    assert send("oea-k3", "oea-k3").headers[HEADER] == "oea-k3"
    response = send("oea-k3", "vanilla")
    assert response.status_code == 400
    assert "says 'oea-k3', header" in response.json()["message"]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_error_after_the_choice_says_no_policy(served: Running, path: str) -> None:
    too_long = {"text": "a " * 9000, "prompt": "a " * 9000}
    content = {"messages": [{"role": "user", "content": "a " * 9000}]}
    body = {**ENDPOINTS[path], **(content if "chat" in path else too_long)}
    response = served.http.post(path, json=body, headers={HEADER: "oea-k3"})
    assert response.status_code == 400, response.text
    assert "context length" in response.text
    assert HEADER not in response.headers


def test_scripts_of_other_origins_may_read_the_header(served: Running) -> None:
    response = served.http.post(
        "/v1/completions",
        json=ENDPOINTS["/v1/completions"],
        headers={HEADER: "oea-k3", "Origin": "https://app.example"},
    )
    assert response.headers["Access-Control-Allow-Origin"] in ("*", "https://app.example")
    exposed = response.headers["Access-Control-Expose-Headers"].lower()
    assert HEADER.lower() in exposed.split(", ")


@pytest.mark.parametrize("usage", [False, True], ids=["plain", "usage"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_last_event_of_a_stream_says_the_policy(served: Running, path: str, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    body = {**ENDPOINTS[path], **options, "stream": True, "n": 2}
    body["max_tokens"] = 64  # several events, however many tokens a busy server puts in one
    response = served.http.post(path, json=body, headers={HEADER: "oea-k3"})
    found = events(response)
    assert response.text.rstrip().endswith("data: [DONE]")
    said = [event for event in found if "sglext" in event]
    assert all(event["sglext"] == {"moe_routing_policy": "oea-k3"} for event in said)
    assert found[-1] in said
    ended = [choice["index"] for event in said for choice in event["choices"]]
    assert sorted(ended) == [0, 1]
    more = [choice for event in found if event not in said for choice in event["choices"]]
    assert more
    assert all(choice["finish_reason"] is None for choice in more)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_whole_answer_says_the_policy_where_sglang_extends_it(served: Running, path: str) -> None:
    answer = served.http.post(path, json={**ENDPOINTS[path], "model": "demo@oea-k3"}).json()
    assert answer["sglext"] == {"moe_routing_policy": "oea-k3"}
    assert answer["metadata"].pop("moe_routing_policy") == "oea-k3"
    assert set(answer["metadata"]) == {"weight_version", "weight_versions"}  # SGLang's own


def test_strict_client_reads_whole_chats_and_streams(served: Running) -> None:
    strict = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", _strict_response_validation=True
    )
    asked: Any = {"model": "demo@oea-k3", "messages": MESSAGES, "max_tokens": 2}
    whole = strict.chat.completions.create(**asked)
    assert whole.model_extra["sglext"]["moe_routing_policy"] == "oea-k3"
    *_, last = strict.chat.completions.create(**asked, stream=True)
    assert last.model_extra["sglext"]["moe_routing_policy"] == "oea-k3"


class Exact(CustomLogitProcessor):
    """Forces a token, and ends the engine's scheduler if it is given more than the token."""

    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        for row, params in enumerate(custom_param_list):
            assert set(params) == {"token_id", "__req__"}, params
            logits[row] = -1e9
            logits[row, params["token_id"]] = 0
        return logits


class Nothing(CustomLogitProcessor):
    """The same for requests without parameters."""

    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        assert custom_param_list == [None] * len(logits), custom_param_list
        return logits


for _processor in (Exact, Nothing):
    _processor.__module__ = "__main__"  # sent by value: the scheduler cannot import tests


def test_logit_processors_get_what_the_client_sent(served: Running) -> None:
    def send(processor: type[CustomLogitProcessor], **params: Any) -> list[list[int]]:
        sampling = {"max_new_tokens": 3, "n": 2, "ignore_eos": True, **params}
        answer = served.http.post(
            "/generate",
            json={
                "text": ["The", "And"],
                "sampling_params": sampling,
                "custom_logit_processor": processor.to_str(),
            },
            headers={HEADER: "oea-k3"},
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers[HEADER] == "oea-k3"
        return [item["output_ids"] for item in answer.json()]

    assert send(Exact, custom_params={"token_id": 7}) == [[7, 7, 7]] * 4
    assert len(send(Nothing)) == 4
    assert served.http.get("/health_generate").status_code == 200


def test_error_has_sglangs_own_shape(served: Running) -> None:
    body = ENDPOINTS["/v1/completions"]
    response = served.http.post("/v1/completions", json=body, headers={HEADER: "no-such"})
    assert {"object": "error", "code": 400, "param": None}.items() <= response.json().items()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_beam_search_under_a_policy_is_a_400(served: Running, stream: bool) -> None:
    params = {"max_new_tokens": 2, "beam_width": 2}
    body = {"text": "The", "sampling_params": params, "stream": stream}
    response = served.http.post("/generate", json=body, headers={HEADER: "oea-k3"})
    assert response.status_code == 400
    assert "beam search" in response.text


@pytest.mark.parametrize("custom_params", [[1], "oea-k3", 3, True])
def test_custom_params_that_are_no_object_are_a_400(served: Running, custom_params: Any) -> None:
    params = {"max_new_tokens": 2, "custom_params": custom_params}
    response = served.http.post("/generate", json={"text": "The", "sampling_params": params})
    assert response.status_code == 400
    assert f"custom_params is {custom_params!r}, expected an object" in response.json()["message"]


def test_policies_are_listed(served: Running) -> None:
    listing = served.http.get("/v1/moe_routing/policies").json()
    assert listing["default"] == "vanilla"
    assert listing["header"] == HEADER
    choosable = {item["id"]: item["choosable"] for item in listing["data"]}
    assert choosable["oea-k3"] is True
    assert choosable["private"] is False


def test_requests_that_generate_nothing_are_left_alone(served: Running) -> None:
    response = served.http.get("/health", headers={HEADER: "no-such"})
    assert response.status_code == 200
    assert HEADER not in response.headers


@pytest.mark.parametrize("path", ["/release_memory_occupation", "/resume_memory_occupation"])
def test_memory_is_not_released_on_a_cpu_and_the_server_serves_on(
    served: Running, path: str
) -> None:
    answer = served.http.post(path, json={})
    assert answer.status_code == 400, answer.text
    assert "neither released nor resumed on the portable CPU platform" in answer.text
    assert served.http.get("/health_generate").status_code == 200
