"""The script for machines with a GPU, as far as it goes without one: its servers take minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import Options, Report, Step
from sglang_moe_routing.kernels import native

SCRIPT = Path(gpu_check.__file__)
CPU = Options(cpu=True, server_flags=[])


def run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    kernels = {native.CACHE: str(native.cache_folder())}  # built by other tests already
    command = [sys.executable, SCRIPT, path, *arguments]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **kernels})
    return done.returncode, json.loads(path.read_text())


def test_the_result_is_one_file_with_machine_versions_and_steps(tmp_path: Path) -> None:
    status, result = run(tmp_path / "r.json", "--cpu", "--only", "build", "--only", "gpu tests")
    assert status == 0
    assert result["ok"] is True
    assert {"date", "seconds", "accelerator", "commit", "versions", "steps"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert result["steps"]["gpu tests"] == {"status": "skipped", "reason": "needs a GPU"}
    built = result["steps"]["build"]
    assert built["status"] == "ok"
    assert built["figures"]["cpu"].startswith("cpu ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_gpu_is_said_to_be_one(tmp_path: Path) -> None:
    status, result = run(tmp_path / "r.json")
    assert status == 1
    assert result["ok"] is False
    assert "torch sees no CUDA device; --cpu" in result["steps"]["machine"]["reason"]


def test_a_failed_step_hides_no_other_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: Options) -> None:
        raise ValueError("T is 4")

    def skip(options: Options) -> None:
        raise gpu_check.SkippedError("nothing here")

    steps = {"a": Step(fail, 9), "b": Step(skip, 9), "c": Step(lambda o: {"T": 3}, 9)}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    report = Report(tmp_path / "r.json", {})
    for name in steps:
        report.add(name, gpu_check.answer(name, CPU))
    found: Mapping[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert found["ok"] is False
    assert found["steps"] == {
        "a": {"status": "failed", "reason": "ValueError: T is 4"},
        "b": {"status": "skipped", "reason": "nothing here"},
        "c": {"status": "ok", "figures": {"T": 3}},
    }


def test_a_step_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "slow.py"
    program.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    start = time.monotonic()
    result = gpu_check.run_apart("build", CPU, 1)
    assert result == {"status": "failed", "reason": "not done in 1 s"}
    assert time.monotonic() - start < 20


def test_a_step_without_time_left_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "TOTAL_S", 5)
    report = Report(tmp_path / "r.json", {})
    report.run("build", CPU)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["steps"]["build"]["reason"] == "no time left of 5 s"


def test_the_file_goes_where_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_check.parse([]).result == Path("gpu-check.json")
    monkeypatch.setenv("OUT", "/results")
    assert gpu_check.parse([]).result == Path("/results/gpu-check.json")
    assert gpu_check.parse(["x.json"]).result == Path("x.json")
    assert gpu_check.parse(["--server-flags", "--a b --c"]).server_flags == ["--a", "b", "--c"]


def test_sglang_finds_the_plugin_of_a_checkout_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys\n"
        f"sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
        "from importlib.metadata import entry_points as find, version\n"
        "for group in ('plugins', 'platforms'):\n"
        "    print([entry.value for entry in find(group=f'sglang.srt.{group}')])\n"
        "print(version('sglang-moe-routing'), version('sglang-moe-routing-cpu'))"
    )
    with monkeypatch.context() as patch:
        nothing = SimpleNamespace(names=frozenset[str]())
        patch.setattr(gpu_check.metadata, "entry_points", lambda group: nothing)
        gpu_check.publish_plugin(tmp_path)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "sglang_moe_routing.integration.plugin:register" in found.stdout, found.stderr
    assert "sglang_moe_routing.cpu.plugin:activate" in found.stdout
