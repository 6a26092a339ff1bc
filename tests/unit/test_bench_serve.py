"""`bench serve` without a server: the client's command line and results, order, summary, errors."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_moe_routing.bench import serve
from sglang_moe_routing.bench.serve import Run, Settings, Target
from sglang_moe_routing.cli import app
from sglang_moe_routing.config import bundled_config, load_config
from sglang_moe_routing.errors import BenchError, EngineError
from sglang_moe_routing.serving.machine import describe_machine

RUNNER = CliRunner()
SETTINGS = Settings(concurrency=2, input_len=4, output_len=3, num_prompts=2, rounds=2)
TARGET = Target("http://127.0.0.1:9/", "a/model", "X-Policy")


def result(**changes: Any) -> str:
    """A result file of the client, cut down to what is read."""
    values: dict[str, Any] = {
        "completed": 2,
        "median_tpot_ms": 20.0,
        "median_itl_ms": 19.0,
        "p95_itl_ms": 30.0,
        "median_ttft_ms": 100.0,
        "output_throughput": 50.0,
        "output_lens": [3, 3],
        "errors": ["", ""],
    }
    return json.dumps(values | changes) + "\n"


def run(policy: str, number: int, tpot_ms: float, active: float | None = 10.0) -> Run:
    return Run(policy, number, tpot_ms, tpot_ms, tpot_ms, 100.0, 50.0, active, active, 2.0)


def test_policies_take_turns() -> None:
    assert list(serve.order(["a", "b"], 2)) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_client_sends_what_was_asked_for_under_the_policy(tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    command = serve.client_command(TARGET, "fast", SETTINGS, seed=7, output=output)
    options = dict(itertools.pairwise(command))
    assert options["-m"] == "sglang.benchmark.serving"
    assert options["--base-url"] == "http://127.0.0.1:9"
    assert options["--header"] == "X-Policy=fast"
    assert options["--max-concurrency"] == "2"
    assert options["--random-input-len"] == "4"
    assert options["--random-output-len"] == "3"
    assert options["--random-range-ratio"] == "1"  # all of that length
    assert options["--warmup-requests"] == "0"  # they would be counted
    assert options["--seed"] == "7"
    assert options["--output-file"] == str(output)


def test_output_is_read() -> None:
    assert serve.parse_output(result(), SETTINGS) == {
        "tpot_ms": 20.0,
        "itl_ms": 19.0,
        "itl_p95_ms": 30.0,
        "ttft_ms": 100.0,
        "output_tokens_per_s": 50.0,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wrote no result"),
        ("{}\n", "wrote no result"),
        (result(median_tpot_ms=None), "wrote no result"),
        (result() + result(), "wrote no result"),
        (result(completed=1, errors=["", "a\nBad Request: no\n"]), "1 of 2 requests failed: Bad"),
        (result(completed=1), "1 of 2 requests failed: no reason given"),
        (result(output_lens=[3, 2]), "answers of 2 to 3 tokens instead of 3"),
    ],
)
def test_broken_output_is_an_error(text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        serve.parse_output(text, SETTINGS)


def counts(rows: int, calls: int) -> dict[str, int]:
    return {"layers": 4, "rows": rows, "calls": calls}


@pytest.mark.parametrize("rows", [16, 24])  # 2 requests x 2 steps x 4 layers, or one step more
def test_rows_of_the_run_are_counted(rows: int) -> None:
    found = serve.rows_per_step(counts(100, 50), counts(100 + rows, 58), SETTINGS)
    assert found == rows / 8


@pytest.mark.parametrize("rows", [15, 25])
def test_other_rows_are_an_error(rows: int) -> None:
    with pytest.raises(BenchError, match="other traffic"):
        serve.rows_per_step(counts(100, 50), counts(100 + rows, 58), SETTINGS)


def test_summary_takes_medians_and_compares_within_a_round() -> None:
    times = {"vanilla": [10.0, 20.0, 40.0], "fast": [9.0, 10.0, 24.0]}
    runs = [run(name, i + 1, ms) for name, all_ms in times.items() for i, ms in enumerate(all_ms)]
    found = serve.summary(runs)
    assert list(found) == ["vanilla", "fast"]
    assert found["vanilla"]["tpot_ms"] == 20.0
    assert found["vanilla"]["tpot_ms_spread"] == 15.0
    assert found["vanilla"]["tpot_saving_percent"] == 0.0
    assert found["fast"]["tpot_ms"] == 10.0
    assert found["fast"]["tpot_saving_percent"] == 40.0  # of 10, 50 and 40
    assert found["fast"]["runs"] == 3


def test_summary_without_vanilla_and_statistics_has_nulls() -> None:
    found = serve.summary([run("fast", 1, 10.0, active=None)])["fast"]
    assert found["tpot_saving_percent"] is None
    assert found["active_experts"] is None
    assert found["tpot_ms_spread"] == 0.0


def test_client_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('some'); raise SystemExit('no such dataset')"]
    with pytest.raises(BenchError, match=r"ended with status 1:\n(?s:.*)no such dataset"):
        asyncio.run(serve._call(command, "none", tmp_path / "x.log"))


def test_server_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no answer from http://127.0.0.1:9/ under fast"):
        asyncio.run(serve.measure(TARGET, ["fast"], ["a"], SETTINGS, tmp_path))


def test_end_of_the_server_is_the_reason_given(tmp_path: Path) -> None:
    def check() -> None:
        raise EngineError("the server ended with status 9")

    target = Target("http://127.0.0.1:9", "a/model", check=check)
    with pytest.raises(EngineError, match="ended with status 9"):
        asyncio.run(serve.measure(target, ["fast"], ["a"], SETTINGS, tmp_path))


def test_missing_client_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install 'sglang>="):
        asyncio.run(serve.measure(TARGET, ["fast"], ["a"], SETTINGS, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give a MODEL to serve"),
        (["--url", "http://127.0.0.1:9", "--cpu"], 2, "not --url"),
        (["a/model", "--url", "http://127.0.0.1:9", "--", "--tp", "2"], 2, "not --url"),
        (["a/model", "--policies", "vanilla,oea-k9"], 1, "'oea-k9' is not in the config"),
        (["--url", "http://127.0.0.1:9"], 1, "Is the server running there?"),
        (["a/model", "--ronds", "2"], 2, "No such option"),
    ],
)
def test_command_says_what_is_wrong_before_it_measures(
    arguments: list[str], status: int, message: str
) -> None:
    found = RUNNER.invoke(app, ["bench", "serve", *arguments])
    assert found.exit_code == status
    text = " ".join(found.stderr.replace("│", " ").split())
    assert message in text


def test_bench_config_has_the_policies_of_the_issue() -> None:
    config = load_config(bundled_config("bench.yaml")).config
    assert config.choosable == ("vanilla", "oea-k3", "oea-k5", "topk-k3")


def test_machine_is_described() -> None:
    found = json.loads(json.dumps(describe_machine()))
    assert found["cores"] >= 1
    assert found["versions"]["torch"]
