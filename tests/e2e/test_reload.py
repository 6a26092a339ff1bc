"""Live reload on the real server: all processes or none, between two steps, no request lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.integration.recorder import read_records
from tests.recorded import check_call

from .conftest import HEADER, Running

ADMIN = {"Authorization": "Bearer admin-key"}
SIMILARITY = demo.CONFIG.with_name("similarity.safetensors")
OEA = {"kind": "oea", "p": 1.0, "k_max": None, "max_rank": None}


def text(policies: str, more: str = "") -> str:
    return f"version: 1\nsimilarity: {{demo: {SIMILARITY}}}\n{more}\npolicies: {{{policies}}}\n"


FIRST = text("fast: {kind: oea, k0: 3}, other: {kind: topk, k0: 2}")


class Reloading:
    """A running server and its config file."""

    def __init__(self, running: Running, path: Path) -> None:
        self.running, self.path = running, path

    def reload(self, content: str, headers: dict[str, str] = ADMIN) -> httpx.Response:
        self.path.write_text(content)
        return self.running.http.post("/moe_routing/reload", headers=headers)

    def policies(self) -> list[str]:
        listing = self.running.http.get("/v1/moe_routing/policies").json()
        return [policy["id"] for policy in listing["data"]]

    def generate(self, policy: str, max_new_tokens: int = 4, **extra: Any) -> httpx.Response:
        body = {"text": "The", "sampling_params": params(max_new_tokens), **extra}
        return self.running.http.post("/generate", json=body, headers={HEADER: policy})


def params(max_new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=["eager", "graphs"])
def server(
    request: Any, start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reloading]:
    """One that decodes eagerly, one that runs SGLang's decode graph runner."""
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text(FIRST)
    flags = ["--admin-api-key", "admin-key"]
    settings = {}
    if request.param == "graphs":
        flags += ["--enable-torch-compile", "--cuda-graph-backend-prefill", "disabled"]
        flags += ["--cuda-graph-bs-decode", "4", "16"]
        settings = {"SGLANG_MOE_ROUTING_EMULATE_GRAPHS": "1"}
    with start(path, *flags, **settings) as running:
        yield Reloading(running, path)


@pytest.fixture(autouse=True)
def _first_config(server: Reloading) -> None:
    assert server.reload(FIRST).status_code == 200


def check_k0(calls: list[dict[str, Any]], name: str, k0: int) -> None:
    assert calls
    for call in calls:
        check_call(call, {name: {**OEA, "k0": k0}})


def test_new_definition_is_in_force(server: Reloading) -> None:
    check_k0(server.running.record(lambda: server.generate("fast")), "fast", 3)
    answer = server.reload(text("fast: {kind: oea, k0: 5}, extra: {kind: oea, k0: 1}"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["policies"] == ["vanilla", "fast", "extra"]
    assert server.policies() == ["vanilla", "fast", "extra"]
    check_k0(server.running.record(lambda: server.generate("fast")), "fast", 5)
    check_k0(server.running.record(lambda: server.generate("extra")), "extra", 1)
    gone = server.generate("other")
    assert gone.status_code == 400
    assert "unknown MoE routing policy 'other'" in gone.text


def test_artifact_may_come_with_a_reload(server: Reloading) -> None:
    answer = server.reload(text("similar: {kind: sere, num_primary: 2, threshold: 0.2}"))
    assert answer.status_code == 200, answer.text
    calls = server.running.record(lambda: server.generate("similar"))
    policy = {"kind": "sere", "S": 2, "rho": 0.2}
    matrices = load_artifact(SIMILARITY).matrices
    for call in calls:
        check_call(call, {"similar": policy}, {n: m.float().numpy() for n, m in matrices.items()})


INVALID = {
    "version: 1\npolicies: {fast: {kind: oea}}": "policies.fast.k0: missing",
    "nonsense: [": "not valid YAML",
    text("fast: {kind: oea, k0: 9}"): "policies.fast.k0: 9 exceeds the model's top_k of 8",
    "version: 1\nsimilarity: {demo: /nowhere}": "/nowhere",
    text("fast: {kind: oea, k0: 3}", "statistics: false"): "statistics: True -> False",
    text("fast: {kind: oea, k0: 3}", "isolation: {policies: {fast: g}}"): "isolation",
}


@pytest.mark.parametrize("content", INVALID)
def test_invalid_file_changes_nothing(server: Reloading, content: str) -> None:
    answer = server.reload(content)
    assert answer.status_code == 400, answer.text
    assert INVALID[content] in answer.json()["message"]
    assert server.policies() == ["vanilla", "fast", "other"]
    check_k0(server.running.record(lambda: server.generate("fast")), "fast", 3)


@pytest.mark.parametrize("how", ["missing", "folder"])
def test_unreadable_file_changes_nothing(server: Reloading, how: str) -> None:
    server.path.unlink()
    if how == "folder":
        server.path.mkdir()
    try:
        answer = server.running.http.post("/moe_routing/reload", headers=ADMIN)
    finally:
        if how == "folder":
            server.path.rmdir()
        server.path.write_text(FIRST)
    assert answer.status_code == 400
    assert f"{server.path}: cannot read the routing config" in answer.json()["message"]
    assert server.generate("fast").status_code == 200


def test_running_request_keeps_its_definition(server: Reloading) -> None:
    """It runs on under the old k0 while a new request of the same name runs under the new."""

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.running.url, timeout=300) as http:
            body = {"text": "The", "sampling_params": params(120), "stream": True, "rid": "old"}
            sent = http.stream("POST", "/generate", json=body, headers={HEADER: "fast"})
            async with sent as response:
                events = response.aiter_lines()
                await anext(events)  # it has begun
                server.running.records.mkdir()
                server.path.write_text(text("fast: {kind: oea, k0: 6}"))
                answer = await http.post("/moe_routing/reload", headers=ADMIN)
                assert answer.status_code == 200, answer.text
                new = {"text": "And", "sampling_params": params(8), "rid": "new"}
                answer = await http.post("/generate", json=new, headers={HEADER: "fast"})
                assert answer.status_code == 200, answer.text
                lines = [line async for line in events]
        assert "data: [DONE]" in lines

    try:
        asyncio.run(run())
        calls = list(read_records(server.running.records))
    finally:
        for file in server.running.records.iterdir():
            file.unlink()
        server.running.records.rmdir()
    together = 0
    for call in calls:
        live = [place for place, row in enumerate(call["rows"]) if row is not None]
        if call["requests"]:  # a replayed graph knows none; older requests come first
            assert call["requests"][0] == "old"
        for place, name in zip(live, ("before", "after"), strict=False):
            call["rows"][place] = name
        check_call(call, {"before": {**OEA, "k0": 3}, "after": {**OEA, "k0": 6}})
        together += set(call["rows"]) >= {"before", "after"}
    assert together >= 4, "both definitions were never in one batch"


def test_kv_of_a_former_definition_is_not_reused(server: Reloading) -> None:
    prompt = {"text": demo.read_prompts()[0] * 3}

    def cached() -> int:
        return int(server.generate("fast", **prompt).json()["meta_info"]["cached_tokens"])

    cached()
    assert cached() > 0
    server.reload(text("fast: {kind: oea, k0: 4}"))
    assert cached() == 0


def test_hangup_signal_reloads(server: Reloading) -> None:
    server.path.write_text(text("signalled: {kind: oea, k0: 3}"))
    os.kill(server.running.server.process.pid, signal.SIGHUP)
    deadline = time.monotonic() + 60
    while server.policies() != ["vanilla", "signalled"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.policies() == ["vanilla", "signalled"]
    server.path.write_text("broken: [")
    os.kill(server.running.server.process.pid, signal.SIGHUP)
    log = server.running.server.log
    while "routing config not reloaded" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "broken" in log.read_text() or "not valid YAML" in log.read_text()
    assert server.generate("signalled").status_code == 200


def test_reload_needs_the_admin_key(server: Reloading) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert server.reload(FIRST, headers).status_code == 401
    assert server.running.http.get("/moe_routing/reload", headers=ADMIN).status_code == 405


def test_clients_cannot_reload_through_sglangs_own_route(server: Reloading) -> None:
    body = {"server_args": {"moe_routing_reload": 2, "moe_routing_token": 1}}
    answer = server.running.http.post("/set_internal_state", json=body, headers=ADMIN)
    assert answer.json() == [False]


def test_reload_under_load_loses_no_request(server: Reloading) -> None:
    other = "other: {kind: topk, k0: 2}"
    variants = [text(f"fast: {{kind: oea, k0: {k0}}}, {other}") for k0 in (2, 4)]
    stop = False
    finished: list[str] = []

    async def client(http: httpx.AsyncClient, policy: str) -> None:
        while not stop:
            body = {"text": "The", "sampling_params": params(6)}
            answer = await http.post("/generate", json=body, headers={HEADER: policy})
            assert answer.status_code == 200, answer.text
            assert answer.headers[HEADER] == policy
            assert answer.json()["meta_info"]["completion_tokens"] == 6
            finished.append(policy)

    async def run() -> None:
        nonlocal stop
        async with httpx.AsyncClient(base_url=server.running.url, timeout=300) as http:
            clients = [
                asyncio.create_task(client(http, policy))
                for policy in ("fast", "other", "vanilla", "fast")
            ]
            for i in range(9):
                server.path.write_text(variants[i % 2])
                answer = await http.post("/moe_routing/reload", headers=ADMIN)
                assert answer.status_code == 200, answer.text
                await asyncio.sleep(0.3)
            stop = True
            await asyncio.gather(*clients)

    asyncio.run(run())
    assert {"fast", "other", "vanilla"} <= set(finished)
