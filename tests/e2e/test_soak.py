"""A short soak of a real server, and proof that its checks can fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from tests.soak import answers, asks, checks, figures, readings

from .conftest import HEADER, Running

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [
    {
        "layer": layer,
        "calls": 4,
        "rows": 12,
        "active_experts": 40,
        "active_experts_base": 60,
        "moved_slots": 30,
        "critical_experts": 2,
    }
    for layer in range(2)
]
NO_COUNTS = [dict.fromkeys(layer, 0) for layer in LAYERS]
EMPTY = readings.Reading(0, NO_COUNTS, 0, 0, {"http": 1000.0}, rows={}, rejected=0)
FULL = replace(EMPTY, layers=LAYERS)
SERVED = asks.Served(HEADER, "vanilla", ["vanilla", "topk"], {"vanilla": "vanilla", "topk": "topk"})


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of a soak at 4 and 24 concurrent requests, on a pool that 24 overflow."""
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    sizes = ["--concurrency", "4", "24", "--seconds", "15", "--warm-up-seconds", "10"]
    sizes += ["--reload-every", "4"]
    pool = ["--max-total-tokens", "1024", "--log", str(out.with_name("server.log"))]
    command = [sys.executable, "-m", "tests.soak", *sizes, *pool, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return json.loads(out.read_text())


def total(result: Mapping[str, Any], name: str) -> Counter[str]:
    return sum((Counter(phase[name]) for phase in result["phases"]), Counter())


def test_a_short_soak_finds_nothing_wrong(soaked: dict[str, Any]) -> None:
    assert soaked["problems"] == []
    outcomes = total(soaked, "outcomes")
    assert outcomes["completed"] > 60
    assert outcomes["cancelled"] > 0
    assert outcomes["refused"] > 0
    assert outcomes["failed"] == 0


def test_a_short_soak_covers_policies_endpoints_and_retraction(soaked: dict[str, Any]) -> None:
    assert set(total(soaked, "policies")) == {"vanilla", "topk-k3", "oea-k3", "sere-s3"}
    assert set(total(soaked, "named_by")) == {"header", "body", "alias", "none"}
    assert set(total(soaked, "endpoints")) == set(asks.PATHS)
    assert sum(phase["retractions"] for phase in soaked["phases"]) > 0
    assert any(phase["active_experts"] < phase["active_experts_base"] for phase in soaked["phases"])


def test_a_short_soak_reloads_all_the_while(soaked: dict[str, Any]) -> None:
    assert soaked["reloads"] >= 5


def test_a_short_soak_accounts_for_every_decode_row(soaked: dict[str, Any]) -> None:
    exact = [phase for phase in soaked["phases"] if phase["name"].startswith("exact")]
    assert len(exact) == 2
    for phase in exact:
        low, high = phase["rows_implied"]
        assert low == high > 0
        assert set(phase["rows"]) == {low}


def test_a_short_soak_follows_the_memory_of_every_process(soaked: dict[str, Any]) -> None:
    series = soaked["memory_over_time"]
    for part in ("http", "scheduler", "detokenizer"):
        (label,) = (label for label in soaked["memory"] if part in label)
        assert soaked["memory"][label]["warm_mib"] > 100
        assert "slope_mib_per_minute" in soaked["memory"][label]
        assert len(series["mib"][label]) == len(series["seconds"]) > 10


def asked(path: str, *, stream: bool) -> asks.Ask:
    """A request of 3 tokens under oea-k3."""
    body: dict[str, Any] = {"model": "demo", "max_tokens": 3, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if path == "/generate":
        sampling = {"max_new_tokens": 3, "ignore_eos": True}
        body = {"text": "It was", "sampling_params": sampling, "stream": stream}
    elif "chat" in path:
        body["messages"] = [{"role": "user", "content": "It was"}]
    else:
        body["prompt"] = "It was"
    return asks.Ask(path, "oea-k3", "header", stream, 1, 3, {HEADER: "oea-k3"}, body)


async def _send(url: str, ask: asks.Ask) -> answers.Outcome:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        return await answers.send(http, ask, HEADER)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", asks.PATHS)
def test_real_answers_that_were_not_asked_for_are_problems(
    served: Running, path: str, stream: bool
) -> None:
    ask = asked(path, stream=stream)
    assert asyncio.run(_send(served.url, ask)).kind == "completed"
    for wrong, problem in (
        (replace(ask, policy="topk-k3"), "header names policy 'oea-k3' instead of 'topk-k3'"),
        (replace(ask, max_tokens=4), "3 tokens instead of 1 times 4"),
        (replace(ask, n=2), "3 tokens instead of 2 times 3"),
        (replace(ask, refusal="unknown MoE routing policy"), "instead of 400"),
        (replace(ask, headers={HEADER: "no-such-policy"}), "status 400"),
    ):
        outcome = asyncio.run(_send(served.url, wrong))
        assert outcome.kind == "failed"
        assert any(problem in found for found in outcome.problems), outcome.problems


def test_an_answer_whose_body_names_another_policy_is_a_problem() -> None:
    body = {"sglext": {"moe_routing_policy": "vanilla"}, "choices": []}
    reply = answers.Reply(status=200, policy="oea-k3", bodies=[body])
    found = answers.judge(asked("/v1/completions", stream=False), reply)
    assert found == ["body names policy 'vanilla' instead of 'oea-k3'"]


def test_a_stream_without_end_is_a_problem() -> None:
    end = {"choices": [{"finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    reply = answers.Reply(status=200, policy="oea-k3", bodies=[end], ended=True)
    ask = asked("/v1/completions", stream=True)
    assert answers.judge(ask, reply) == []
    assert answers.judge(ask, replace(reply, ended=False)) == ["the stream has no end"]


def outcome(kind: str, max_tokens: int) -> answers.Outcome:
    ask = replace(asked("/v1/completions", stream=True), max_tokens=max_tokens)
    return answers.Outcome(ask, kind, [])


def test_counts_must_be_those_that_the_answers_imply() -> None:
    done = [outcome("completed", 9), outcome("completed", 5)]
    assert checks.implied_rows(done, retracted=0) == checks.Rows(12, 12)
    assert checks.check_counts(EMPTY, FULL, done, SERVED) == []
    for wrong in (done[:1], [*done, outcome("completed", 2)]):
        assert len(checks.check_counts(EMPTY, FULL, wrong, SERVED)) == len(LAYERS)
    given_up = [*done[:1], outcome("cancelled", 5)]
    assert checks.implied_rows(given_up, retracted=2) == checks.Rows(6, 12)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": 11}, "different rows"),
        ({"calls": 3}, "different calls"),
        ({"calls": 0}, "counted no calls"),
        ({"active_experts": 61}, "more experts than without"),
        ({"critical_experts": 41}, "impossible counts"),
        ({"calls": 13}, "impossible counts"),
    ],
)
def test_counts_that_cannot_be_are_problems(change: dict[str, int], problem: str) -> None:
    after = replace(FULL, layers=[LAYERS[0], LAYERS[1] | change])
    done = [outcome("completed", 13)]
    assert any(problem in found for found in checks.check_counts(EMPTY, after, done, SERVED))


def test_metrics_must_be_those_that_the_answers_imply() -> None:
    done = [outcome("completed", 13), outcome("refused", 5)]
    after = replace(FULL, rows={"oea-k3": 12, "vanilla": 0}, rejected=1)
    assert checks.check_metrics(EMPTY, after, done, exact=True) == []
    other = replace(after, rows={"oea-k3": 11, "vanilla": 1})
    assert checks.check_metrics(EMPTY, other, done, exact=False) == []
    for wrong in (other, replace(after, rejected=0)):
        assert len(checks.check_metrics(EMPTY, wrong, done, exact=True)) == 1
    assert len(checks.check_metrics(EMPTY, replace(after, rows={}), done, exact=False)) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"used_tokens": 7}, "7 KV tokens are in use while idle"),
        ({"retracted": 1}, "1 retractions in the log, 0 in the metrics"),
        ({"rss_mib": {}}, "processes ended: http"),
    ],
)
def test_an_idle_server_in_another_state_is_a_problem(change: Any, problem: str) -> None:
    assert checks.check_state(EMPTY, EMPTY) == []
    (found,) = checks.check_state(EMPTY, replace(EMPTY, **change))
    assert found.startswith(problem)


def test_memory_that_grows_beyond_the_bound_is_a_problem() -> None:
    warm, end = {"http": 1000.0}, {"http": 1060.0, "new": 70.0}
    memory, found = checks.check_growth(warm, end, 2000, bound_mib=64)
    assert memory["http"]["growth_mib_per_1000_requests"] == 30
    assert found == ["new grew by 70.0 MiB over 2000 requests, more than 64"]


def test_faults_in_the_log_are_problems() -> None:
    assert checks.check_log("Traceback (most recent call last):\nINFO: all well\n") == [
        "in the log: Traceback (most recent call last):"
    ]


def test_the_status_tells_of_problems(soaked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    assert figures.report(soaked, out, Console()) == 0
    assert figures.report(soaked | {"problems": ["planted"]}, out, Console()) == 1
    assert json.loads(out.read_text())["problems"] == ["planted"]
