"""Isolation groups on the real server: chosen by API key or policy, never by the client."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.config import load_config
from sglang_moe_routing.runtime.definitions import define
from tests.recorded import check_recorded

from .conftest import HEADER, Running

ADMIN_KEY = "admin-key"
KEYS = {"alice-key": "alice", "bob-key": "bob"}
RULES: dict[str, dict[str, Any]] = {"fast": {"k0": 2}, "vanilla": {}}


@pytest.fixture(scope="module")
def isolated(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    keys = "".join(
        f"    {hashlib.sha256(key.encode()).hexdigest()}: {group}\n" for key, group in KEYS.items()
    )
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text(
        "version: 1\npolicies: {fast: {kind: oea, k0: 2}}\nisolation:\n  api_keys:\n" + keys
    )
    with start(path, "--admin-api-key", ADMIN_KEY) as running:
        yield running


def headers(key: str, policy: str = "fast") -> dict[str, str]:
    return {HEADER: policy, "Authorization": f"Bearer {key}"}


def body(text: str = "The", **custom: Any) -> dict[str, Any]:
    params = {"max_new_tokens": 10, "temperature": 0, "ignore_eos": True, "custom_params": custom}
    return {"text": text, "sampling_params": params}


def generate_all(url: str, requests: list[tuple[str, str]]) -> list[str]:
    """Texts of concurrent requests, each an API key and a policy; long enough to meet."""
    prompts = demo.read_prompts()
    long = {**body()["sampling_params"], "max_new_tokens": 32}

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            return await asyncio.gather(
                *(
                    http.post(
                        "/generate",
                        json={
                            "text": prompts[i],
                            "sampling_params": long,
                            "rid": f"{key}-{i}-{id(requests)}",
                        },
                        headers=headers(key, policy),
                    )
                    for i, (key, policy) in enumerate(requests)
                )
            )

    answers = asyncio.run(send_all())
    assert [answer.status_code for answer in answers] == [200] * len(requests)
    return [answer.json()["text"] for answer in answers]


def test_rows_ride_on_their_own_group(isolated: Running) -> None:
    requests = [(key, policy) for key in KEYS for policy in ("fast", "fast", "fast", "vanilla")]
    calls = isolated.record(lambda: generate_all(isolated.url, requests))
    groups: Counter[frozenset[str]] = Counter()
    check_recorded(calls, RULES)  # each group's call obeys the oracle by itself
    for call in calls:
        named = zip(call["requests"], call["rows"], strict=True)
        groups[frozenset(rid.split("-")[0] for rid, row in named if row is not None)] += 1
    assert set(groups) == {frozenset({"alice"}), frozenset({"bob"})}
    both = [call for call in calls if len({rid.split("-")[0] for rid in call["requests"]}) == 2]
    assert both, "the groups never shared a batch"


def test_statistics_are_those_of_all_rows_together(isolated: Running) -> None:
    def read() -> dict[str, Any]:
        key = headers("bob-key")
        (data,) = isolated.http.get("/v1/moe_routing/statistics", headers=key).json()["data"]
        return dict(data)

    before = read()["layers"]
    requests = [(key, "fast") for key in KEYS for _ in range(4)]
    calls = isolated.record(lambda: generate_all(isolated.url, requests))
    after = read()["layers"]
    for start, end in zip(before, after, strict=True):
        mine = [call for call in calls if call["layer"] == start["layer"]]
        rows = sum(row is not None for call in mine for row in call["rows"])
        assert end["rows"] - start["rows"] == rows
        active = end["active_experts"] - start["active_experts"]
        assert active <= sum(len(call["union"]) for call in mine)  # groups may share experts
        assert active < end["active_experts_base"] - start["active_experts_base"]


def test_key_must_be_listed(isolated: Running) -> None:
    for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic alice-key"}):
        answer = isolated.http.post("/generate", json=body(), headers=given)
        assert answer.status_code == 401, answer.text
        assert "belongs to no group" in answer.text
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for stream in (False, True):
        answer = isolated.http.post("/v1/chat/completions", json={**chat, "stream": stream})
        assert answer.status_code == 401
    answer = isolated.http.post("/v1/chat/completions", json=chat, headers=headers("bob-key"))
    assert answer.status_code == 200


def test_client_cannot_name_its_group(isolated: Running) -> None:
    for group in ("bob", "default", "nix", 7):
        sent = body(moe_routing_group=group)
        answer = isolated.http.post("/generate", json=sent, headers=headers("alice-key"))
        assert answer.status_code == 400, answer.text
        assert "set by the server" in answer.text


@pytest.mark.parametrize("path", ["policies", "statistics"])
def test_what_the_server_says_of_itself_needs_a_key(isolated: Running, path: str) -> None:
    def ask(**given: str) -> int:
        return isolated.http.get(f"/v1/moe_routing/{path}", headers=given).status_code

    assert ask() == 401
    assert ask(Authorization="Bearer other") == 401
    assert ask(Authorization="Bearer alice-key") == 200
    assert ask(Authorization=f"Bearer {ADMIN_KEY}") == 200


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_what_sglang_says_of_itself_holds_no_statistics(isolated: Running, path: str) -> None:
    answer = isolated.http.get(path)
    assert answer.status_code == 200
    (state,) = answer.json()["internal_states"]
    assert "world_size" in state
    assert "moe_routing" not in state


@pytest.mark.parametrize("path", ["/encode", "/classify", "/v1/embeddings"])
def test_embeddings_need_a_listed_key(isolated: Running, path: str) -> None:
    sent = {"text": "The", "input": "The", "model": "demo"}
    answer = isolated.http.post(path, json=sent)
    assert answer.status_code == 401, answer.text
    assert "belongs to no group" in answer.text
    answer = isolated.http.post(path, json=sent, headers=headers("alice-key"))
    assert answer.status_code == 400, answer.text  # the demo model embeds nothing
    assert "embedding" in answer.text


def test_health_needs_no_key(isolated: Running) -> None:
    assert isolated.http.get("/health_generate").status_code == 200


def test_kv_is_not_shared_between_groups(isolated: Running) -> None:
    prompt = body("A prompt of its own, long enough to fill several pages of the cache. " * 3)

    def cached(key: str) -> int:
        answer = isolated.http.post("/generate", json=prompt, headers=headers(key))
        return int(answer.json()["meta_info"]["cached_tokens"])

    cached("alice-key")
    assert cached("alice-key") > 0
    assert cached("bob-key") == 0


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_clients_own_namespace_is_none_of_ours(isolated: Running, field: str) -> None:
    """It separates KV further. It cannot name what another group or policy has written."""
    (fast,) = (d for d in define(load_config(isolated.config), {}) if d.name == "fast")
    prompt = f"A prompt with {field}, as long as several pages of the cache, and never seen. " * 3

    def cached(key: str, policy: str, given: str | None) -> int:
        answer = isolated.http.post(
            "/generate",
            json={**body(prompt), field: given},
            headers=headers(key, policy),
        )
        return int(answer.json()["meta_info"]["cached_tokens"])

    cached("alice-key", "fast", None)
    assert cached("alice-key", "fast", None) > 0
    alices = f"{fast.cache_key}alice|"
    for policy, given in (("fast", "alice|"), ("vanilla", alices), ("vanilla", f"|{alices}")):
        assert cached("bob-key", policy, given) == 0
        assert cached("bob-key", policy, given) > 0  # it works as a namespace of the client


def test_a_session_keeps_its_group(isolated: Running) -> None:
    opened = isolated.http.post("/open_session", json={"capacity_of_str_len": 1000}).json()

    def continue_session(key: str, rid: str | None) -> httpx.Response:
        session = {"id": opened, "rid": rid}
        sent = {**body("And"), "session_params": session}
        return isolated.http.post("/generate", json=sent, headers=headers(key))

    first = continue_session("alice-key", None)
    assert first.status_code == 200, first.text
    rid = first.json()["meta_info"]["id"]
    refused = continue_session("bob-key", rid)
    assert refused.status_code == 400, refused.text
    assert "isolation group" in refused.text
    assert continue_session("alice-key", rid).status_code == 200


def test_beams_are_in_the_group_of_their_request(isolated: Running) -> None:
    """The further rows of a beam search have no request of their own."""
    beam = {**body("Once upon"), "rid": "bob-beam"}
    beam["sampling_params"] = {"max_new_tokens": 10, "temperature": 0, "beam_width": 3}

    async def send_both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=isolated.url, timeout=300) as http:
            return await asyncio.gather(
                http.post("/generate", json=beam, headers=headers("bob-key", "vanilla")),
                http.post(
                    "/generate", json={**body(), "rid": "alice-1"}, headers=headers("alice-key")
                ),
            )

    answers: list[httpx.Response] = []
    calls = isolated.record(lambda: answers.extend(asyncio.run(send_both())))
    assert [answer.status_code for answer in answers] == [200, 200]
    rows: Counter[str] = Counter()
    check_recorded(calls, RULES)
    for call in calls:
        named = zip(call["requests"], call["rows"], strict=True)
        (rid,) = {rid for rid, row in named if row is not None}
        rows[rid] += sum(row is not None for row in call["rows"])
    assert set(rows) == {"alice-1", "bob-beam"}
    assert rows["bob-beam"] > 2 * rows["alice-1"]
