"""Live reload on the real server: all processes or none, between two steps, no request lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.serving.server import free_port
from sglang_moe_routing.testing import read_records
from tests.recorded import check_recorded

from .conftest import HEADER, Running
from .test_metrics import TOP_K, settled

ADMIN = {"Authorization": "Bearer admin-key"}
KEY = ("--admin-api-key", "admin-key")
SIMILARITY = demo.CONFIG.with_name("similarity.safetensors")


def text(policies: str, more: str = "") -> str:
    always = f"version: 1\nsimilarity: {{demo: {SIMILARITY}}}\nmetrics: {{interval: 0.2}}\n"
    return f"{always}{more}\npolicies: {{{policies}}}\n"


OTHER = "other: {{kind: topk, k0: 2, engage: {{min_rows: {}}}}}"
FIRST = text(f"fast: {{kind: oea, k0: 3}}, {OTHER.format(2)}")


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
    flags = [*KEY]
    settings = {}
    if request.param == "graphs":
        flags += ["--enable-torch-compile", "--cuda-graph-backend-prefill", "disabled"]
        flags += ["--cuda-graph-bs-decode", "4", "16"]
        settings = {"SGLANG_MOE_ROUTING_EMULATE_GRAPHS": "1"}
    with start(path, *flags, **settings) as running:
        yield Reloading(running, path)


@pytest.fixture(autouse=True)
def _first_config(request: pytest.FixtureRequest) -> None:
    for name in {"server", "pair"} & set(request.fixturenames):
        assert request.getfixturevalue(name).reload(FIRST).status_code == 200


def check_k0(calls: list[dict[str, Any]], name: str, k0: int) -> None:
    assert calls
    check_recorded(calls, {name: {"k0": k0}})


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


def test_numbers_of_live_rows_may_change_again_and_again(server: Reloading) -> None:
    """Captured graphs have room for the former ones and the new ones."""
    for min_rows in (3, 4, 5):
        answer = server.reload(text(f"fast: {{kind: oea, k0: 3}}, {OTHER.format(min_rows)}"))
        assert answer.status_code == 200, answer.text
    calls = server.running.record(lambda: server.generate("other"))
    check_recorded(calls, {"other": {}})


def test_artifact_may_come_with_a_reload(server: Reloading) -> None:
    answer = server.reload(text("similar: {kind: sere, num_primary: 2, threshold: 0.2}"))
    assert answer.status_code == 200, answer.text
    calls = server.running.record(lambda: server.generate("similar"))
    matrices = {n: m.float().numpy() for n, m in load_artifact(SIMILARITY).matrices.items()}
    check_recorded(calls, {"similar": {"k0": 2, "threshold": 0.2}}, matrices)


INVALID = {
    "version: 1\npolicies: {fast: {kind: oea}}": "policies.fast.k0: missing",
    "nonsense: [": "not valid YAML",
    text("fast: {kind: oea, k0: 9}"): "policies.fast.k0: 9 exceeds the model's top_k of 8",
    text("fast: {kind: oea, k0: {default: 3, layers: {50-60: 1}}}"): (
        "policies.fast.k0.layers.50-60: the model has no MoE layer at 50-60; its MoE layers are 0-3"
    ),
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
        check_recorded([call], {"before": {"k0": 3}, "after": {"k0": 6}})
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


def test_a_policy_that_is_hardly_meant_is_told_in_the_log(server: Reloading) -> None:
    assert server.reload(text("hasty: {kind: budget, max_active: 8}")).status_code == 200
    warning = "policies.hasty.max_active: 8 is close to the model's top_k of 8"
    assert server.running.server.log.read_text().count(warning) == 1


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


# --- weights that change while serving ----------------------------------------------------------

SERE = "similar: {kind: sere, num_primary: 2, threshold: 0.2}"
OTHER_WEIGHTS = f"similarity: {{demo: {{path: {SIMILARITY}, allow_other_weights: true}}}}"


@pytest.fixture
def weights(request: pytest.FixtureRequest) -> Iterator[Callable[..., httpx.Response]]:
    """Asks a server to take the weights of a folder; at the end it gets its own back."""
    (name,) = {"server", "pair"} & set(request.fixturenames)
    reloading: Reloading = request.getfixturevalue(name)

    def update(folder: Path, **options: Any) -> httpx.Response:
        body = {"model_path": str(folder), **options}
        return reloading.running.http.post("/update_weights_from_disk", json=body, headers=ADMIN)

    yield update
    reloading.reload(FIRST)
    assert update(demo.MODEL).status_code == 200


def texts(server: Reloading) -> list[str]:
    return [server.generate(name, 12).json()["text"] for name in ("vanilla", "similar")]


def test_other_weights_are_refused_while_a_policy_leans_on_an_artifact(
    server: Reloading, weights: Callable[..., httpx.Response], permuted: Path
) -> None:
    assert server.reload(text(SERE)).status_code == 200
    before = texts(server)
    answer = weights(permuted)
    assert answer.status_code == 400, answer.text
    assert answer.json()["success"] is False
    message = answer.json()["message"]
    assert "weights not updated: similarity artifact 'demo' (made for moe-routing-demo)" in message
    assert f"was made for other weights than {permuted}: fingerprint" in message
    assert f"similarity.demo.allow_other_weights: true in {server.path}" in message
    for path, body in {
        "/begin_weight_update": {},
        "/update_weights_from_ipc": {"zmq_handles": {}},
        "/weights_checker": {"action": "reset_tensors"},
    }.items():
        answer = server.running.http.post(path, json=body, headers=ADMIN)
        assert answer.status_code == 400, answer.text
        assert "nothing tells which they are" in answer.json()["message"]
    assert texts(server) == before
    calls = server.running.record(lambda: server.generate("similar"))
    matrices = {n: m.float().numpy() for n, m in load_artifact(SIMILARITY).matrices.items()}
    check_recorded(calls, {"similar": {"k0": 2, "threshold": 0.2}}, matrices)


def test_an_idle_server_takes_other_weights_once_a_reload_has_taken_the_policy_out(
    server: Reloading, weights: Callable[..., httpx.Response], permuted: Path
) -> None:
    """Though the scheduler still holds the batch of the policy's last request, which has ended."""
    assert server.reload(text(SERE)).status_code == 200
    assert server.generate("similar").status_code == 200
    assert server.reload(FIRST).status_code == 200
    answer = weights(permuted)
    assert answer.status_code == 200, answer.text


def test_the_weights_of_the_artifact_are_taken(
    server: Reloading, weights: Callable[..., httpx.Response]
) -> None:
    assert server.reload(text(SERE)).status_code == 200
    before = texts(server)
    answer = weights(demo.MODEL)
    assert answer.status_code == 200, answer.text
    assert texts(server) == before


def test_an_artifact_that_allows_other_weights_goes_on_under_them(
    server: Reloading, weights: Callable[..., httpx.Response], permuted: Path
) -> None:
    always = text(SERE).replace(f"similarity: {{demo: {SIMILARITY}}}", OTHER_WEIGHTS)
    assert server.reload(always).status_code == 200
    assert weights(permuted).status_code == 200
    assert "allowed by similarity.demo.allow_other_weights" in server.running.server.log.read_text()
    assert server.generate("similar").status_code == 200


def test_policies_without_artifact_go_on_under_other_weights(
    server: Reloading, weights: Callable[..., httpx.Response], permuted: Path
) -> None:
    """And a reload holds artifacts to the weights of now, wherever they came from."""
    before = server.generate("vanilla", 12).json()["text"]
    assert weights(permuted).status_code == 200
    assert server.generate("vanilla", 12).json()["text"] == before
    check_k0(server.running.record(lambda: server.generate("fast")), "fast", 3)
    answer = server.reload(text(SERE))
    assert answer.status_code == 400
    assert f"was made for other weights than {permuted}: fingerprint" in answer.json()["message"]
    assert weights(demo.MODEL).status_code == 200
    assert server.reload(text(SERE)).status_code == 200


def test_after_a_session_of_updates_nobody_knows_the_weights(
    server: Reloading, weights: Callable[..., httpx.Response]
) -> None:
    for path in ("/begin_weight_update", "/end_weight_update"):
        answer = server.running.http.post(path, json={}, headers=ADMIN)
        assert answer.status_code == 200, answer.text
    answer = server.reload(text(SERE))
    assert answer.status_code == 400
    assert "cannot be held to the weights of a weight-update session" in answer.json()["message"]
    check_k0(server.running.record(lambda: server.generate("fast")), "fast", 3)


def test_graphs_captured_anew_reroute_and_keep_the_counts(
    server: Reloading, weights: Callable[..., httpx.Response]
) -> None:
    def rows() -> int:
        (data,) = server.running.http.get("/v1/moe_routing/statistics").json()["data"]
        return int(data["layers"][0]["rows"])

    server.generate("fast", 5)
    before = rows()
    assert before >= 4
    assert weights(demo.MODEL, recapture_cuda_graph=True).status_code == 200
    assert rows() == before
    check_k0(server.running.record(lambda: server.generate("fast", 5)), "fast", 3)
    assert rows() == before + 4


# --- several schedulers ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["--tp-size", "--dp-size"])
def pair(
    request: Any, start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reloading]:
    """Two ranks that share every layer, or two replicas."""
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text(FIRST)
    with start(path, request.param, "2", *KEY, "--enable-metrics") as running:
        yield Reloading(running, path)


def record_both(pair: Reloading) -> list[list[dict[str, Any]]]:
    """Calls of either scheduler: replicas take turns."""
    calls = pair.running.record(lambda: [pair.generate("fast") for _ in range(4)])
    pids = sorted({call["pid"] for call in calls})
    assert len(pids) == 2
    return [[call for call in calls if call["pid"] == pid] for pid in pids]


@contextlib.contextmanager
def unable_to_open_files(process: psutil.Process) -> Iterator[None]:
    used = {int(entry.name) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
    lowest_free = next(number for number in itertools.count() if number not in used)
    limits = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, limits)


def test_every_scheduler_reloads_or_none_does(pair: Reloading) -> None:
    """The second one cannot read the file; then it can."""
    for calls in record_both(pair):
        check_k0(calls, "fast", 3)
    new = text("fast: {kind: oea, k0: 5}, extra: {kind: oea, k0: 1}")
    family = psutil.Process(pair.running.server.process.pid).children(recursive=True)
    *_, last = sorted((p for p in family if "scheduler" in p.name()), key=lambda p: p.pid)
    with unable_to_open_files(last):
        answer = pair.reload(new)
    assert answer.status_code == 400
    assert "Too many open files" in answer.json()["message"]
    assert pair.policies() == ["vanilla", "fast", "other"]
    for calls in record_both(pair):
        check_k0(calls, "fast", 3)
    answer = pair.reload(new)
    assert answer.status_code == 200, answer.text
    assert pair.policies() == ["vanilla", "fast", "extra"]
    for calls in record_both(pair):
        check_k0(calls, "fast", 5)


def test_every_scheduler_refuses_other_weights(
    pair: Reloading, weights: Callable[..., httpx.Response], permuted: Path
) -> None:
    assert pair.reload(text(SERE)).status_code == 200
    before = [pair.generate("similar", 12).json()["text"] for _ in range(2)]
    answer = weights(permuted)
    assert answer.status_code == 400, answer.text
    assert "was made for other weights than" in answer.json()["message"]
    assert [pair.generate("similar", 12).json()["text"] for _ in range(2)] == before


def test_metrics_add_replicas_up_and_count_one_rank(pair: Reloading) -> None:
    for _ in range(4):
        assert pair.generate("fast").status_code == 200
    data = pair.running.http.get("/v1/moe_routing/statistics").json()["data"]
    layers = [layer for scheduler in data for layer in scheduler["layers"]]
    wanted = {
        "moe_calls_total": sum(layer["calls"] for layer in layers),
        "slots_total": sum(layer["rows"] for layer in layers) * TOP_K,
        "active_experts_total": sum(layer["active_experts"] for layer in layers),
        "base_active_experts_total": sum(layer["active_experts_base"] for layer in layers),
    }
    values = settled(pair.running, lambda now: now["moe_calls_total",] == wanted["moe_calls_total"])
    assert {name: values[name,] for name in wanted} == wanted
    assert values["rows_total", "fast"] == sum(s["policies"]["fast"]["rows"] for s in data)


# --- several nodes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Reloading]]:
    """Two nodes on this machine, a tensor-parallel rank and a copy of the config on each."""
    paths = [tmp_path_factory.mktemp(f"node{rank}") / "routing.yaml" for rank in range(2)]
    flags = ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}"]
    for path in paths:
        path.write_text(FIRST)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        contexts = [
            start(path, *flags, "--node-rank", str(rank), *KEY) for rank, path in enumerate(paths)
        ]
        running = list(pool.map(stack.enter_context, contexts))  # they wait for each other
        yield [Reloading(*node) for node in zip(running, paths, strict=True)]


def test_nodes_reload_together_or_not_at_all(nodes: list[Reloading]) -> None:
    first, second = nodes

    def check_both(k0: int) -> None:
        theirs: list[dict[str, Any]] = []
        mine = first.running.record(
            lambda: theirs.extend(second.running.record(lambda: first.generate("fast")))
        )
        check_k0(mine, "fast", k0)
        check_k0(theirs, "fast", k0)

    check_both(3)
    new = text("fast: {kind: oea, k0: 5}")
    answer = first.reload(new)
    assert answer.status_code == 400
    assert f"tensor-parallel rank 1: {second.path} differs from" in answer.json()["message"]
    check_both(3)
    second.path.write_text(new)
    answer = first.reload(new)
    assert answer.status_code == 200, answer.text
    check_both(5)
