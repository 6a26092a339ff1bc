"""The example package: the page shows it, it installs, and kernels and reference agree on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.errors import PolicyError
from sglang_moe_routing.kernels import choose
from sglang_moe_routing.policies import MAX_ROWS, Place, Vanilla, build_table
from tests import examples

PROGRAM = """
import json, sys
import torch
from sglang_moe_routing.config import load_config
from sglang_moe_routing.kernels import refine
from sglang_moe_routing.policies import Router, build_table, reroute

config = load_config(sys.argv[1]).config
table = build_table(config.definitions, layer=0, top_k=8, num_experts=64)
router, generator, active = Router(), torch.Generator().manual_seed(0), {}
for mix in (["growing"], ["vanilla", "growing", "oea-k3"]):
    for num_rows in (1, 2, 3, 4, 16, 40, 300):
        logits = torch.randn(num_rows, 64, generator=generator)
        scores, gates = router.score(logits)
        weights, ids = gates.topk(8)
        weights, ids = weights / weights.sum(dim=1, keepdim=True), ids.int()
        names = [mix[row % len(mix)] for row in range(num_rows)]
        policy_ids = torch.tensor([config.names.index(name) for name in names], dtype=torch.int32)
        expected = reroute(scores, gates, ids, weights, policy_ids, table, renormalize=True)
        found_ids, found_weights, union = refine(logits, ids, weights, policy_ids, table, router)
        assert torch.equal(found_ids, expected.topk_ids)
        assert torch.equal(union, expected.union)
        torch.testing.assert_close(found_weights, expected.topk_weights, rtol=1e-5, atol=1e-7)
        active[f"{len(mix)} of {num_rows}"] = [int(expected.active), int(expected.active_base)]
print(json.dumps(active))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with the example package in it, built and installed."""
    folder = tmp_path_factory.mktemp("example")
    return {**os.environ, **examples.install(examples.EXAMPLE, folder)}


@pytest.fixture(scope="module")
def torch_installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with the page's policy in torch in it, as a package."""
    folder = tmp_path_factory.mktemp("torch")
    return {**os.environ, **examples.install(examples.torch_package(folder), folder)}


def run(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def check(env: dict[str, str], config: Path) -> dict[str, Any]:
    """What ``check`` says of a config, and its exit status."""
    options = ["--json", "--routing-config", config, "--model", demo.MODEL]
    done = run(env, "-m", "sglang_moe_routing", "check", *options)
    assert done.stdout.startswith("{"), done.stderr
    return {**json.loads(done.stdout), "status": done.returncode}


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("python", "my_policies.py"),
        ("python", "test_my_policies.py"),
        ("toml", "pyproject.toml"),
        ("yaml", "routing.yaml"),
    ],
)
def test_the_page_shows_the_files_of_the_example(language: str, name: str) -> None:
    text = (examples.EXAMPLE / name).read_text()
    assert text in examples.blocks(language)
    assert len(text.splitlines()) <= 25


def test_the_installed_example_passes_its_own_tests(installed: dict[str, str]) -> None:
    tests = examples.EXAMPLE / "test_my_policies.py"
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_the_installed_example_is_listed_with_its_docstring(installed: dict[str, str]) -> None:
    config = examples.EXAMPLE / "routing.yaml"
    done = run(installed, "-m", "sglang_moe_routing", "policies", "--json", config)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["kinds"]["doubling"].startswith("A budget of active experts that grows")
    assert [row["kind"] for row in listed["policies"]] == ["vanilla", "doubling", "oea"]


def refusal(env: dict[str, str], folder: Path, config: str) -> str:
    """What ``validate`` says of a config that it refuses."""
    (folder / "routing.yaml").write_text(config)
    command = [sys.executable, "-m", "sglang_moe_routing", "validate", "routing.yaml"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.removeprefix("error: ")


def test_refusals_are_what_the_page_prints(installed: dict[str, str], tmp_path: Path) -> None:
    """Without the package, with a wrong value, and with a package that lacks its module."""
    config, page = (examples.EXAMPLE / "routing.yaml").read_text(), examples.PAGE.read_text()
    unknown = refusal(dict(os.environ), tmp_path, config)
    wrong = refusal(installed, tmp_path, config.replace("0.05", "5"))
    (metadata,) = Path(installed["PYTHONPATH"].split(os.pathsep)[0]).glob("*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)
    without_module = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(without_module)}
    for line in (unknown, wrong, refusal(env, tmp_path, config)):
        assert line in page


@pytest.mark.skipif(not choose("cpu").is_native, reason="no compiled kernels")
def test_kernels_and_reference_agree_on_the_installed_example(
    installed: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run(installed, program, examples.EXAMPLE / "routing.yaml")
    assert done.returncode == 0, done.stderr
    active = json.loads(done.stdout)
    budgets = {1: 8, 2: 11, 3: 11, 4: 14, 16: 21, 40: 24, 300: 34}  # 8 + round(doublings * 3.2)
    for num_rows, budget in budgets.items():
        found, base = active[f"1 of {num_rows}"]
        assert found == min(budget, base)
    assert all(found < base for found, base in (active["3 of 40"], active["3 of 16"]))


def test_the_rule_of_the_example_changes_at_its_steps_only() -> None:
    policy = examples.example_class().model_validate({"share": 0.05})
    build_table([Vanilla(), policy], layer=0, top_k=8, num_experts=64)
    rules = [policy.rule(Place(0, n, 8, 64)) for n in range(1, 1025)]
    changes = {n + 1 for n in range(1, 1024) if rules[n] != rules[n - 1]}
    assert changes == policy.steps()
    assert policy.rule(Place(0, MAX_ROWS, 8, 64)).max_active == 8 + round(8 * 3.2)


def test_an_example_that_forgets_its_steps_is_refused() -> None:
    class Forgetful(examples.example_class()):  # type: ignore[misc]  # made at run time
        def steps(self) -> set[int]:
            return set()

    with pytest.raises(PolicyError) as refused:
        build_table([Forgetful(share=0.05)], layer=0, top_k=8, num_experts=64)
    assert str(refused.value) in examples.PAGE.read_text()


# --- policies in torch --------------------------------------------------------------------------

TORCH = "version: 1\npolicies: {other: {kind: min_p}, fast: {kind: oea, k0: 3}}\n"
ALLOWED = TORCH + "torch_policies: allow\n"
PRICE = (
    "policies.other.kind: min_p: written in torch. While such a policy is listed, rows of "
    "every policy are computed by the torch reference, many times slower than by the compiled "
    "kernels"
)
REMEDY = (
    "Let it give a Rule, list it in another server's config, or accept the price with a top-level "
    "torch_policies: allow"
)


@pytest.mark.skipif(not choose("cpu").is_native, reason="no compiled kernels")
def test_check_refuses_a_policy_in_torch_beside_kernels(
    torch_installed: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "routing.yaml"
    config.write_text(TORCH)
    found = check(torch_installed, config)
    assert (found["status"], found["ok"]) == (1, False)
    assert found["problems"] == [f"{config}: {PRICE}. {REMEDY}"]
    assert PRICE.partition(": ")[2] in " ".join(examples.PAGE.read_text().split())


@pytest.mark.skipif(not choose("cpu").is_native, reason="no compiled kernels")
def test_check_warns_of_a_policy_in_torch_that_the_config_allows(
    torch_installed: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "routing.yaml"
    config.write_text(ALLOWED)
    found = check(torch_installed, config)
    assert (found["status"], found["problems"], found["warnings"]) == (0, [], [PRICE])


def test_check_says_nothing_of_it_where_there_are_no_kernels(
    torch_installed: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "routing.yaml"
    config.write_text(TORCH)
    found = check({**torch_installed, "SGLANG_MOE_ROUTING_KERNELS": "torch"}, config)
    assert (found["status"], found["problems"], found["warnings"]) == (0, [], [])
