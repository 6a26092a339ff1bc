"""The `demo` and `client` commands as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

from .conftest import Running

COMMAND = [sys.executable, "-m", "sglang_moe_routing"]


def test_demo_shows_the_saving_and_checks_the_routing() -> None:
    run = subprocess.run([*COMMAND, "demo", "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    policies = found["policies"]
    assert set(policies) == {"vanilla", "topk-k3", "oea-k3", "sere-s3"}
    for numbers in policies.values():
        assert numbers["requests"] == 16
        assert numbers["tokens"] == 16 * 32
        assert numbers["tpot_ms"] > 0
    vanilla = policies["vanilla"]
    assert vanilla["active_experts"] == vanilla["active_experts_base"]
    oea, sere = policies["oea-k3"], policies["sere-s3"]
    assert oea["active_experts"] <= 0.75 * vanilla["active_experts"]
    assert sere["active_experts"] <= 1.05 * oea["active_experts"]
    mixed = found["mixed"]
    assert mixed["vanilla_identical"] is True
    assert mixed["violations"] == []
    assert mixed["rows_checked"] == mixed["tokens"] * 4 - 16 * 4  # the first token is prefill's
    assert set(mixed["policies"]) == set(policies)


def test_client_compares_policies_on_a_running_server(served: Running) -> None:
    options = ["--url", served.url, "--policies", "vanilla,oea-k3", "--max-tokens", "8", "--json"]
    run = subprocess.run(
        [*COMMAND, "client", *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    policies = json.loads(run.stdout)["policies"]
    assert policies["oea-k3"]["active_experts"] < policies["vanilla"]["active_experts"]
    assert policies["vanilla"]["tokens"] == 16 * 8


def test_client_names_the_policies_that_there_are(served: Running) -> None:
    options = ["--url", served.url, "--policies", "no-such"]
    run = subprocess.run(
        [*COMMAND, "client", *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "policy 'no-such' is not served; available: vanilla, oea-k3" in " ".join(
        run.stderr.split()
    )


def test_client_says_when_nobody_answers() -> None:
    run = subprocess.run(
        [*COMMAND, "client", "--url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Is the server running there?" in " ".join(run.stderr.split())
