"""The commands as a user runs them, from a wheel installed outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from sglang_moe_routing import demo

from .conftest import Running

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs ``sglang-moe-routing`` of the wheel, in a fresh virtual environment.

    Dependencies come from this environment: SGLang's are 11 GB.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    dependencies = Path(found.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(folder / "venv/bin/sglang-moe-routing"), *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )

    where = "import sglang_moe_routing; print(sglang_moe_routing.__file__)"
    package = subprocess.run(
        [python, "-c", where], check=True, capture_output=True, text=True, cwd=folder
    )
    assert package.stdout.startswith(str(folder)), package.stdout
    return run


def test_source_distribution_holds_what_the_tests_read(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("docker", "docs", "examples", "tests", "scripts", "configs", "csrc"):
        files = (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc")
        assert {str(p.relative_to(ROOT)) for p in files} - names == set()
    files = {
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "Makefile",
        "docker/Dockerfile",
        ".ci/run",
    }
    assert (
        files | {"docker/Dockerfile", ".pre-commit-config.yaml", ".github/workflows/publish.yml"}
        <= names
    )


def test_source_distribution_passes_tests_of_its_own(distributions: Path, tmp_path: Path) -> None:
    """Those of documents and packaging, which read most; the workflow `publish` runs more."""
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    tests = ["tests/unit/test_docs.py", "tests/unit/test_packaging.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_wheel_holds_everything_that_it_needs(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    for wanted in (
        "sglang_moe_routing/py.typed",
        "sglang_moe_routing/configs/default.yaml",
        "sglang_moe_routing/configs/schema.json",
        "sglang_moe_routing/demo/demo.yaml",
        "sglang_moe_routing/demo/similarity.safetensors",
        "sglang_moe_routing/demo/model/model.safetensors",
        "sglang_moe_routing/demo/model/README.md",
    ):
        assert wanted in names
    assert not any(name.startswith("tests/") for name in names)
    assert wheel.stat().st_size < 10e6


def test_check_says_that_all_is_well(command: Command) -> None:
    run = command("check", "--json", "--model", str(demo.MODEL))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["ok"] is True
    assert found["sglang"] == version("sglang")
    assert len(found["hooks"]) > 20
    assert all(hook["ok"] for hook in found["hooks"])
    assert found["config"]["policies"] == ["vanilla", "fast"]
    assert found["warnings"] == []


def test_check_names_what_is_wrong(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\nsimilarity: {a: none.safetensors}\n")
    run = command("check", "--json", "--routing-config", str(path))
    assert run.returncode == 1
    found = json.loads(run.stdout)
    assert found["ok"] is False
    assert "no such similarity artifact" in found["problems"][0]


def share_of_base(numbers: dict[str, float]) -> float:
    """Experts that are left of those that the router chose. On a busy machine requests start one
    after the other, and all policies load fewer; the share stays."""
    return numbers["active_experts"] / numbers["active_experts_base"]


@pytest.mark.serial  # policies are compared by how many requests run at once
def test_demo_shows_the_saving_and_checks_the_routing(command: Command) -> None:
    run = command("demo", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    policies = found["policies"]
    assert set(policies) == {"vanilla", "topk-k3", "oea-k3", "sere-s3", "budget-24"}
    for numbers in policies.values():
        assert numbers["requests"] == 16
        assert numbers["tokens"] == 16 * 32
        assert numbers["tpot_ms"] > 0
    vanilla = policies["vanilla"]
    assert vanilla["active_experts"] == vanilla["active_experts_base"]
    oea, sere = (share_of_base(policies[name]) for name in ("oea-k3", "sere-s3"))
    assert oea <= 0.75
    assert sere <= 1.05 * oea
    assert policies["budget-24"]["active_experts"] == 24
    mixed = found["mixed"]
    assert mixed["problem"] is None
    steps = 31 * 4  # prefill gives the first of 32 tokens; 4 layers
    assert mixed["rows_checked"] == {
        name: answered["requests"] * steps for name, answered in mixed["policies"].items()
    }
    assert set(mixed["policies"]) == set(policies)


def test_client_compares_policies_on_a_running_server(served: Running, command: Command) -> None:
    options = ["--url", served.url, "--policies", "vanilla,oea-k3", "--max-tokens", "8"]
    run = command("client", *options, "--json")
    assert run.returncode == 0, run.stderr
    policies = json.loads(run.stdout)["policies"]
    assert policies["oea-k3"]["active_experts"] < policies["vanilla"]["active_experts"]
    assert policies["vanilla"]["tokens"] == 16 * 8


def test_client_names_the_policies_that_there_are(served: Running, command: Command) -> None:
    run = command("client", "--url", served.url, "--policies", "no-such")
    assert run.returncode == 1
    message = " ".join(run.stderr.split())
    assert "policy 'no-such' is not served; available: vanilla, oea-k3" in message


def test_client_says_when_nobody_answers(command: Command) -> None:
    run = command("client", "--url", "http://127.0.0.1:9")
    assert run.returncode == 1
    assert "Is the server running there?" in " ".join(run.stderr.split())
