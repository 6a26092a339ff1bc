"""Commands that need no server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sglang_moe_routing import demo
from sglang_moe_routing.cli import app
from sglang_moe_routing.cli.check import moe_sizes
from sglang_moe_routing.cli.evaluate import header
from sglang_moe_routing.errors import EngineError, PolicyError, describe
from sglang_moe_routing.policies import Sizes, builtin_registry
from sglang_moe_routing.serving.server import server_environment

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
    assert set(listing["kinds"]) >= set(builtin_registry())


def test_policies_prints_tables() -> None:
    result = RUNNER.invoke(app, ["policies"])
    assert result.exit_code == 0
    assert "fast" in result.stdout


def helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Each command's and option's name, and the first paragraph of its help."""
    yield name, (command.help or "").partition("\n\n")[0]
    for option in command.params:
        yield f"{name} {option.name}", getattr(option, "help", None) or ""
    for word, one in getattr(command, "commands", {}).items():
        yield from helps(one, f"{name} {word}")


def test_every_help_text_stands_alone() -> None:
    """Not `Of the choice of sequences.`: it starts like a sentence, and ends like one."""
    found = dict(helps(get_command(app), "sglang-moe-routing"))
    alone = re.compile(r"(?!(Of|To|In|For|By|With|At|On)\b)[A-Z`\d].*\.", re.DOTALL)
    assert len(found) > 100
    assert {name: text for name, text in found.items() if not alone.fullmatch(text)} == {}


def test_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).exit_code == 0


def test_results_do_not_name_the_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["evaluate", "/a/model", "--data", "x/b.txt", "--out=/c/d e", "--pairs", "p:q"]
    monkeypatch.setattr(sys, "argv", ["/bin/sglang-moe-routing", *arguments])
    expected = "sglang-moe-routing evaluate model --data x/b.txt '--out=d e' --pairs p:q"
    assert header("/a/model", {})["command"] == expected


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


def test_plugins_that_leave_this_one_out_are_refused() -> None:
    with pytest.raises(EngineError, match="leaves out 'moe_routing'"):
        server_environment(demo.CONFIG, cpu=False, base={"SGLANG_PLUGINS": "other"})


def test_serve_refuses_a_port_in_use_before_starting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = RUNNER.invoke(app, ["serve", str(demo.MODEL), "--port", str(port), "--cpu"])
    assert result.exit_code == 1
    assert f"port {port} of 127.0.0.1 is in use by another process" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no/such/model"], "./no/such/model: no such model folder"),
        (["org/model", "--routing-confg", "x"], "--routing-confg: unknown option; did you mean"),
    ],
)
def test_serve_refuses_what_sglang_would_refuse_late(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["serve", *arguments, "--cpu"])
    assert result.exit_code == 1
    assert message in result.stderr


HOMELESS = """
import os, sys
from sglang_moe_routing.cli import app
from sglang_moe_routing.integration import plugin

os.environ.pop("HOME", None)
os.environ["SGLANG_MOE_ROUTING_CONFIG"] = sys.argv[2]
os.setgroups([])
os.setuid(12345)
if sys.argv[1] == "plugin":
    plugin.register()
app([sys.argv[1], *sys.argv[3:]])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["check", str(demo.CONFIG)], 1),
        (["serve", str(demo.CONFIG), "m"], 1),
        (["plugin", str(demo.CONFIG)], 78),
    ],
)
def test_a_user_without_a_home_folder_is_told_what_to_set(
    arguments: list[str], status: int
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HOMELESS, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    told = " ".join((run.stdout + run.stderr).split())
    assert run.returncode == status, told
    assert "no home folder: HOME is not set, and user id 12345 has no entry in" in told
    assert "set HOME to a folder that this user may write to" in told
    assert "Traceback" not in told


def test_errors_of_the_environment_come_with_a_remedy() -> None:
    assert describe(PolicyError("k0: 9")) == "k0: 9"
    assert "pip install -e ." in describe(ImportError("no name x"))
    assert "below HOME" in describe(PermissionError(13, "Permission denied", "/.cache"))
    assert describe(KeyError("x")) == "KeyError: 'x'"
