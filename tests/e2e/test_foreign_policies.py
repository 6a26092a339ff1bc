"""Kinds of other packages on the real server: a rule on the kernels, and torch where allowed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_routing.kernels import choose
from sglang_moe_routing.testing.oracle import FREE
from tests import examples
from tests.unit.test_example import ALLOWED, PRICE, REMEDY, TORCH

from .conftest import Running
from .test_failing_closed import failed_start, own_message
from .test_reload import KEY, Reloading
from .test_routing import distinct, generate_all, read_statistics

pytestmark = pytest.mark.skipif(not choose("cpu").is_native, reason="no compiled kernels")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a server with the example and the page's policy in torch installed."""
    folder = tmp_path_factory.mktemp("packages")
    paths = [
        examples.install(package, folder)["PYTHONPATH"]
        for package in (examples.EXAMPLE, examples.torch_package(folder))
    ]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def foreign(
    start: Callable[..., Any], packages: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reloading]:
    """A server that serves the page's config."""
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text((examples.EXAMPLE / "routing.yaml").read_text())
    with start(path, *KEY, **packages) as running:
        yield Reloading(running, path)


def rows_of(running: Running, name: str) -> int:
    """Decode rows so far, counted once for all layers."""
    found: int = read_statistics(running)["policies"].get(name, {"rows": 0})["rows"]
    return found


def test_a_foreign_rule_shares_batches_with_built_in_kinds_on_the_kernels(
    foreign: Reloading,
) -> None:
    running, asked = foreign.running, ["growing", "oea-k3"]
    before = {name: rows_of(running, name) for name in asked}
    calls = running.record(lambda: generate_all(running.url, asked, max_new_tokens=24))
    rows = Counter(name for call in calls for name in call["rows"])
    assert any(set(call["rows"]) == set(asked) for call in calls)
    assert rows["growing"] == rows["oea-k3"] == 23 * 4  # decode steps x layers
    after = {name: rows_of(running, name) for name in asked}
    assert {name: after[name] - before[name] for name in asked} == dict.fromkeys(asked, 23)
    assert read_statistics(running)["kernels"] == choose("cpu").name
    assert f"MoE re-routing by {choose('cpu').name}" in running.server.log.read_text()


def test_a_foreign_rule_holds_its_budget(foreign: Reloading) -> None:
    running = foreign.running
    calls = running.record(lambda: generate_all(running.url, ["growing"] * 8))
    assert any(len(call["rows"]) == 8 for call in calls)
    for call in calls:
        num_rows = len(call["rows"])
        budget = 8 + round((num_rows.bit_length() - 1) * 0.05 * 64)
        base = distinct(call["base_ids"], call["rows"])
        assert distinct(call["final_ids"], call["rows"]) == min(budget, base)


def test_a_reload_to_a_policy_in_torch_is_refused_beside_kernels(foreign: Reloading) -> None:
    answer = foreign.reload(TORCH)
    assert answer.status_code == 400, answer.text
    assert f"{PRICE}. {REMEDY}" in answer.json()["message"]
    assert foreign.policies() == ["vanilla", "growing", "oea-k3"]
    foreign.path.write_text((examples.EXAMPLE / "routing.yaml").read_text())


def test_a_policy_in_torch_beside_kernels_stops_the_server(
    packages: dict[str, str], tmp_path: Path
) -> None:
    status, output = failed_start(tmp_path, TORCH, **packages)
    assert status == 78, output[-3000:]
    assert f"{PRICE}. {REMEDY}" in own_message(output)


@pytest.mark.parametrize(
    ("config", "settings", "reason", "num_warnings"),
    [
        (ALLOWED, {}, "policies of kind min_p are written in torch", 1),
        (
            TORCH,
            {"SGLANG_MOE_ROUTING_KERNELS": "torch"},
            "SGLANG_MOE_ROUTING_KERNELS=torch",
            0,
        ),
    ],
    ids=["allowed", "no kernels"],
)
def test_a_policy_in_torch_is_served_with_one_warning_where_kernels_idle(
    start: Callable[..., Any],
    packages: dict[str, str],
    tmp_path: Path,
    config: str,
    settings: dict[str, str],
    reason: str,
    num_warnings: int,
) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(config)
    with start(path, **packages, **settings) as running:
        log = running.server.log.read_text()
        warned = [line for line in log.splitlines() if f"{path}: {PRICE}" in line]
        assert len(warned) == num_warnings
        assert read_statistics(running)["kernels"] == f"torch reference: {reason}"
        calls = running.record(lambda: generate_all(running.url, ["other", "fast"]))
    for call in calls:
        for row, name in enumerate(call["rows"]):
            if name == "other":
                weighed = dict(zip(call["base_ids"][row], call["base_weights"][row], strict=True))
                kept = {j for j, w in weighed.items() if w >= 0.1 * max(weighed.values())}
                assert set(call["final_ids"][row]) - {FREE} == kept
    assert any("other" in call["rows"] for call in calls)
