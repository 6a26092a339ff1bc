"""The exported metrics, scraped by a real Prometheus, against what was sent and counted."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sglang_moe_routing.runtime.metrics import METRICS, PREFIX, REASONS
from tests.programs import prometheus

from .conftest import HEADER, Running

CONFIG = """
version: 1
clients_may_choose: [fast, late]
reload: {http: open}
metrics: {interval: 0.2, per_layer: true}
policies:
  fast: {kind: oea, k0: 3}
  late: {kind: topk, k0: 2, engage: {min_rows: 3}}
  private: {kind: topk, k0: 1}
"""
NUM_LAYERS, TOP_K = 4, 8
SETTLE_S = 30.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def exporting(start: Callable[..., Any], path: Path) -> Iterator[Running]:
    with start(path, "--enable-metrics") as running:
        yield running


def scrape(running: Running) -> dict[tuple[str, ...], float]:
    """Value by name and label values, of our own metrics."""
    text = running.http.get("/metrics", follow_redirects=True).text
    return {
        (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def total(values: dict[tuple[str, ...], float], name: str, *labels: str) -> float:
    return sum(v for key, v in values.items() if key[: len(labels) + 1] == (name, *labels))


def generate(running: Running, policy: str, max_new_tokens: int = 5, text: Any = "The") -> int:
    params = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": params}
    return running.http.post("/generate", json=body, headers={HEADER: policy}).status_code


def settled(running: Running, expected: Callable[[dict[tuple[str, ...], float]], bool]) -> Any:
    """Scrape until the counts of the scheduler have arrived."""
    deadline = time.monotonic() + SETTLE_S
    while not expected(values := scrape(running)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return values


def test_everything_is_counted(exporting: Running) -> None:
    before = scrape(exporting)
    assert generate(exporting, "fast", 5) == 200
    assert generate(exporting, "late", 4) == 200
    assert generate(exporting, "late", 6, ["The", "And", "But"]) == 200
    for bad in ("nix", "private", "a b"):
        assert generate(exporting, bad) == 400

    rows = 4 + 3 + 3 * 5  # the first token comes from prefill
    start = total(before, "slots_total")
    wanted = rows * NUM_LAYERS * TOP_K
    after = settled(exporting, lambda now: total(now, "slots_total") - start >= wanted)

    def added(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert added("requests_total", "fast") == 1
    assert added("requests_total", "late") == 4
    assert {reason: added("rejected_requests_total", reason) for reason in REASONS} == {
        reason: float(reason in ("unknown", "not_allowed", "malformed")) for reason in REASONS
    }
    assert added("rows_total", "fast") == 4
    assert added("rows_total", "late") == 3 + 3 * 5
    assert added("disengaged_rows_total", "late", "min_rows") >= 3
    assert added("slots_total") == wanted
    assert NUM_LAYERS * 4 <= added("moe_calls_total") <= NUM_LAYERS * rows
    assert 0 < added("active_experts_total") < added("base_active_experts_total")
    assert 0 < added("moved_slots_total") < wanted


def test_metrics_agree_with_the_statistics(exporting: Running) -> None:
    generate(exporting, "fast", 8)
    (statistics,) = exporting.http.get("/v1/moe_routing/statistics").json()["data"]
    names = {
        "calls": "moe_calls_total",
        "active_experts": "active_experts_total",
        "active_experts_base": "base_active_experts_total",
        "moved_slots": "moved_slots_total",
        "critical_experts": "critical_experts_total",
    }
    wanted = {
        (name, str(layer["layer"])): layer[key]
        for layer in statistics["layers"]
        for key, name in names.items()
    }
    values = settled(exporting, lambda now: wanted.items() <= now.items())
    assert wanted.items() <= values.items()
    assert values["kernels_info", statistics["experts"], statistics["kernels"]] == 1
    assert statistics["policies"]["fast"]["rows"] == values["rows_total", "fast"]


def test_names_help_and_labels_are_those_promised(exporting: Running) -> None:
    generate(exporting, "late", 3)
    settled(exporting, lambda now: ("rows_total", "late") in now)
    text = exporting.http.get("/metrics", follow_redirects=True).text
    families = {
        family.name.removeprefix(PREFIX): family
        for family in text_string_to_metric_families(text)
        if family.name.startswith(PREFIX)
    }
    assert set(families) == {metric.name for metric in METRICS}
    for metric in METRICS:
        assert families[metric.name].type == metric.kind, metric.name


def test_unknown_names_leave_nothing_behind(exporting: Running) -> None:
    """10,000 of them make no series; what remembered each would show in the process's memory."""
    process = psutil.Process(exporting.server.process.pid)
    body = {"text": "The", "sampling_params": {"max_new_tokens": 2}}

    def refuse(names: range) -> int:
        with exporting.http as http:
            for number in names:
                name = f"unknown-{number}"
                answer = http.post("/generate", json=body, headers={HEADER: name})
                assert answer.status_code == 400
                assert repr(name) in answer.text
        return int(process.memory_info().rss)

    series = set(scrape(exporting))
    before = refuse(range(500))
    after = refuse(range(500, 10_500))
    assert after - before < 16 << 20
    assert set(scrape(exporting)) == series
    assert generate(exporting, "fast") == 200


def test_reload_is_shown(exporting: Running, path: Path) -> None:
    first = scrape(exporting)
    assert first["config_last_reload_successful",] == 1
    path.write_text("nonsense: [")
    assert exporting.http.post("/moe_routing/reload").status_code == 400
    failed = scrape(exporting)
    assert failed["config_last_reload_successful",] == 0
    assert failed["config_hash",] == first["config_hash",]
    path.write_text(
        CONFIG.replace("clients_may_choose: [", "clients_may_choose: [new, ")
        + "  new: {kind: oea, k0: 2}\n"
    )
    answer = exporting.http.post("/moe_routing/reload")
    assert answer.status_code == 200, answer.text
    reloaded = scrape(exporting)
    assert reloaded["config_last_reload_successful",] == 1
    assert reloaded["config_hash",] == int(answer.json()["config_sha256"][:12], 16)
    name = ("config_last_reload_success_timestamp_seconds",)
    assert first[name] < reloaded[name] <= time.time()
    assert ("requests_total", "new") not in first
    assert reloaded["requests_total", "new"] == 0


def test_promtool_finds_no_fault(exporting: Running) -> None:
    promtool = prometheus("promtool")
    text = exporting.http.get("/metrics", follow_redirects=True).text
    ours = "".join(line + "\n" for line in text.splitlines() if PREFIX in line)
    run = subprocess.run(
        [promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@contextlib.contextmanager
def running_prometheus(target: str, folder: Path) -> Iterator[str]:
    program = prometheus()
    config = folder / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n  - job_name: sglang\n    scrape_interval: 1s\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_prometheus_scrapes_it(exporting: Running, tmp_path: Path) -> None:
    generate(exporting, "fast", 4)
    target = exporting.url.removeprefix("http://")
    query = f"{PREFIX}active_experts_total / {PREFIX}moe_calls_total"
    with running_prometheus(target, tmp_path) as url:
        deadline = time.monotonic() + 60
        found: list[dict[str, Any]] = []
        while not found and time.monotonic() < deadline:
            time.sleep(0.5)
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{url}/api/v1/query", params={"query": query})
                if answer.status_code == 200:
                    found = answer.json()["data"]["result"]
        assert {sample["metric"]["layer"] for sample in found} == {"0", "1", "2", "3"}
        assert all(1 <= float(sample["value"][1]) <= 64 for sample in found)
        up = httpx.get(f"{url}/api/v1/query", params={"query": "up"}).json()["data"]["result"]
        assert [sample["value"][1] for sample in up] == ["1"]
