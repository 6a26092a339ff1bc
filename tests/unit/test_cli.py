"""Commands that need no server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moe_routing import demo
from sglang_moe_routing.bench.server import server_environment
from sglang_moe_routing.cli import app
from sglang_moe_routing.cli.check import moe_sizes
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.policies import Sizes

ROOT = Path(__file__).parents[2]
RUNNER = CliRunner()


def test_validate_accepts_the_demo_config_with_its_artifact() -> None:
    result = RUNNER.invoke(app, ["validate", str(demo.CONFIG), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["policies"] == ["vanilla", "topk-k3", "oea-k3", "sere-s3"]


def test_validate_lists_problems(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("version: 1\ndefalt: x\n")
    result = RUNNER.invoke(app, ["validate", str(path), "--json"])
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "did you mean 'default'?" in problem
    result = RUNNER.invoke(app, ["validate", str(path)])
    assert result.exit_code == 1
    assert "did you mean 'default'?" in result.stderr.replace("\n", "")


def test_validate_opens_artifacts(tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\nsimilarity: {a: none.safetensors}\n")
    assert RUNNER.invoke(app, ["validate", str(path)]).exit_code == 1
    assert RUNNER.invoke(app, ["validate", str(path), "--no-artifacts"]).exit_code == 0


def test_check_reads_the_moe_layers_of_a_checkpoint() -> None:
    assert moe_sizes(str(demo.MODEL)) == dict.fromkeys(range(4), Sizes(top_k=8, num_experts=64))


def test_policies_lists_names_and_kinds() -> None:
    result = RUNNER.invoke(app, ["policies", str(ROOT / "configs/mixed.yaml"), "--json"])
    assert result.exit_code == 0
    listing = json.loads(result.stdout)
    by_name = {row["name"]: row for row in listing["policies"]}
    assert by_name["balanced"]["default"] is True
    assert by_name["pruned"]["choosable"] is False
    assert set(listing["kinds"]) == {"budget", "oea", "sere", "topk", "vanilla"}


def test_policies_prints_tables() -> None:
    result = RUNNER.invoke(app, ["policies"])
    assert result.exit_code == 0
    assert "fast" in result.stdout


def test_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).exit_code == 0


def test_serve_refuses_a_bad_config_before_starting(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("version: 1\ndefalt: x\n")
    result = RUNNER.invoke(app, ["serve", "model", "--routing-config", str(path)])
    assert result.exit_code == 1
    assert "did you mean 'default'?" in result.stderr.replace("\n", "")


def test_environment_chooses_the_cpu_platform_on_request() -> None:
    env = server_environment(demo.CONFIG, ["--tp", "2"], cpu=True, base={})
    assert env["SGLANG_PLATFORM"] == "moe_routing_cpu"
    assert env["SGLANG_MOE_ROUTING_CONFIG"] == str(demo.CONFIG)
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert len(env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2


def test_environment_keeps_what_the_operator_set() -> None:
    base = {"OMP_WAIT_POLICY": "active", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    env = server_environment(demo.CONFIG, ["--tp-size=2"], cpu=True, base=base)
    assert base.items() <= env.items()


def test_environment_without_cpu_leaves_the_platform_alone() -> None:
    assert "SGLANG_PLATFORM" not in server_environment(demo.CONFIG, cpu=False, base={})


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"SGLANG_PLUGINS": "other"}, "leaves out 'moe_routing'"),
        ({"SGLANG_PLATFORM": "npu_plugin"}, "SGLANG_PLATFORM=npu_plugin"),
    ],
)
def test_settings_under_which_sglang_skips_the_plugin_are_refused(
    base: dict[str, str], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        server_environment(demo.CONFIG, cpu=False, base=base)
