"""Two workers behind the real router: which headers pass, what a refusal does, grouping."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.studies import router_grouping as grouping
from sglang_moe_routing import demo

from .conftest import CONFIG, HEADER, Running

ROUTER = "SGLANG_ROUTER"
"""Variable that names the router's program, where it is not installed beside this Python."""

FORWARDED = "X-Request-Id-MoE-Routing-Policy"
KEY = "X-SMG-Routing-Key"
POLICIES = ("vanilla", "oea-k3", "topk-k3", "sere-s2")
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "demo", "prompt": "It was", "max_tokens": 4},
    "/v1/chat/completions": {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
    },
    "/generate": {"text": "It was", "sampling_params": {"max_new_tokens": 4}},
}
TOLERANT = ("--policy", "manual", "--assignment-mode", "min_group", "--disable-circuit-breaker")


@pytest.fixture(scope="module")
def route(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Context manager factory: a router in front of running servers, as an HTTP client's root."""
    beside = str(Path(sys.executable).parent)
    program = os.environ.get(ROUTER) or shutil.which("sglang-router", path=beside)
    assert program, f"pip install sglang-router, or name its program in {ROUTER}"

    def start_router(workers: list[Running], *flags: str) -> Any:
        log = tmp_path_factory.mktemp("router") / "log"
        return grouping.running_router([program], [worker.url for worker in workers], flags, log)

    return start_router


@pytest.fixture(scope="module")
def workers(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Running]]:
    """Two workers with a policy header that the router forwards, and the usual one."""
    config = tmp_path_factory.mktemp("config") / "routing.yaml"
    config.write_text(f"{CONFIG}header: [{FORWARDED}, {HEADER}]\n")
    with start(config) as first, start(config) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def fleet(route: Callable[..., Any], workers: list[Running]) -> Iterator[httpx.Client]:
    """Both workers behind a router that groups by key."""
    with route(workers, *TOLERANT) as url, httpx.Client(base_url=url, timeout=300) as http:
        yield http


@pytest.fixture(scope="module")
def unprepared(route: Callable[..., Any], served: Running) -> Iterator[httpx.Client]:
    """A worker with the default header, behind a router."""
    with route([served], *TOLERANT) as url, httpx.Client(base_url=url, timeout=300) as http:
        yield http


def num_refusals(workers: list[Running]) -> int:
    """Requests that the workers have answered with status 400."""
    return sum(worker.server.log.read_text().count('" 400 Bad Request') for worker in workers)


def record_both(workers: list[Running], work: Callable[[], None]) -> list[list[dict[str, Any]]]:
    """MoE calls of either worker during `work`."""
    calls: list[list[dict[str, Any]]] = []
    first = workers[0].record(lambda: calls.append(workers[1].record(work)))
    return [first, *calls]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_policy_passes_through_and_its_name_comes_back(
    fleet: httpx.Client, workers: list[Running], path: str, stream: bool
) -> None:
    def send() -> None:
        body = {**ENDPOINTS[path], "stream": stream, "ignore_eos": True}
        response = fleet.post(path, json=body, headers={FORWARDED: "oea-k3"})
        assert response.status_code == 200
        assert response.headers[FORWARDED] == "oea-k3"
        assert ("data: [DONE]" in response.text) == stream

    first, second = record_both(workers, send)
    assert {name for call in first + second for name in call["rows"]} == {"oea-k3"}


def test_either_header_counts_on_a_worker_and_the_first_is_said(workers: list[Running]) -> None:
    def ask(**headers: str) -> httpx.Response:
        body = ENDPOINTS["/v1/completions"]
        return workers[0].http.post("/v1/completions", json=body, headers=headers)

    for headers in ({HEADER: "oea-k3"}, {HEADER: "oea-k3", FORWARDED: "oea-k3"}):
        response = ask(**headers)
        assert response.headers[FORWARDED] == "oea-k3"
        assert HEADER not in response.headers
    assert ask(**{HEADER: "oea-k3", FORWARDED: "vanilla"}).status_code == 400


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_unknown_policy_gets_the_workers_own_answer_and_no_retry(
    fleet: httpx.Client, workers: list[Running], path: str, stream: bool
) -> None:
    before = num_refusals(workers)
    body = {**ENDPOINTS[path], "stream": stream}
    response = fleet.post(path, json=body, headers={FORWARDED: "nonesuch"})
    assert response.status_code == 400
    assert response.json()["message"].startswith(
        f"unknown MoE routing policy 'nonesuch' in header {FORWARDED}; available: vanilla, "
    )
    assert num_refusals(workers) == before + 1


def send_by_key(url: httpx.URL, num_each: int) -> None:
    """`num_each` requests of every policy at once, each with its policy as routing key."""

    async def send_all() -> None:
        prompts = demo.read_prompts()
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            responses = await asyncio.gather(
                *(
                    http.post(
                        "/v1/completions",
                        json={
                            "model": "demo",
                            "prompt": prompts[i % len(prompts)],
                            "max_tokens": 8,
                            "ignore_eos": True,
                        },
                        headers={FORWARDED: policy, KEY: policy},
                    )
                    for i, policy in enumerate(POLICIES * num_each)
                )
            )
        assert [r.headers.get(FORWARDED) for r in responses] == list(POLICIES * num_each)

    asyncio.run(send_all())


def test_requests_of_one_policy_share_a_worker(fleet: httpx.Client, workers: list[Running]) -> None:
    found = record_both(workers, lambda: send_by_key(fleet.base_url, 4))
    groups = [{name for call in calls for name in call["rows"]} for calls in found]
    assert all(groups), "one worker got everything"
    assert groups[0] | groups[1] == set(POLICIES)
    assert not groups[0] & groups[1]
    assert all(max(len(call["rows"]) for call in calls) > 1 for calls in found)


def test_the_router_drops_the_default_header(unprepared: httpx.Client) -> None:
    """What docs/scale-out.md warns of: not even an unknown name is noticed."""
    for name in ("oea-k3", "nonesuch"):
        response = unprepared.post(
            "/v1/completions", json=ENDPOINTS["/v1/completions"], headers={HEADER: name}
        )
        assert response.status_code == 200
        assert response.headers[HEADER] == "vanilla"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_model_alias_passes_through(unprepared: httpx.Client, path: str) -> None:
    response = unprepared.post(path, json={**ENDPOINTS[path], "model": "demo@oea-k3"})
    assert response.headers[HEADER] == "oea-k3"
    assert response.json()["metadata"]["moe_routing_policy"] == "oea-k3"


@pytest.mark.parametrize(
    ("path", "applied"),
    [("/v1/completions", "oea-k3"), ("/v1/chat/completions", "vanilla"), ("/generate", "vanilla")],
)
def test_the_router_keeps_the_body_field_on_completions_only(
    unprepared: httpx.Client, path: str, applied: str
) -> None:
    choice = {"custom_params": {"moe_routing_policy": "oea-k3"}}
    body = {**ENDPOINTS[path], **choice}
    if path == "/generate":
        body = {**ENDPOINTS[path], "sampling_params": {"max_new_tokens": 4, **choice}}
    assert unprepared.post(path, json=body).headers[HEADER] == applied


def test_the_router_does_not_have_our_routes(unprepared: httpx.Client) -> None:
    for route in ("policies", "statistics"):
        assert unprepared.get(f"/v1/moe_routing/{route}").status_code == 404


def test_refusals_open_the_default_circuit_breaker(
    route: Callable[..., Any], served: Running
) -> None:
    """Why docs/scale-out.md disables it: one client's bad names stop the worker for everybody."""
    body = ENDPOINTS["/v1/completions"]
    with route([served]) as url, httpx.Client(base_url=url, timeout=300) as http:
        bad = {**body, "model": "demo@nonesuch"}
        assert {http.post("/v1/completions", json=bad).status_code for _ in range(10)} == {400}
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 503
    assert "circuits open" in response.text


def test_without_the_circuit_breaker_refusals_harm_nobody(unprepared: httpx.Client) -> None:
    body = ENDPOINTS["/v1/completions"]
    bad = {**body, "model": "demo@nonesuch"}
    assert {unprepared.post("/v1/completions", json=bad).status_code for _ in range(12)} == {400}
    assert unprepared.post("/v1/completions", json=body).status_code == 200
