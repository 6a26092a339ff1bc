"""Who may import whom: only `integration` imports sglang, and only on demand."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sglang_moe_routing"
MODULES = sorted(PACKAGE.rglob("*.py"))

WITHOUT_SGLANG = """
import sys
sys.modules["sglang"] = None  # importing it raises ImportError
import sglang_moe_routing, sglang_moe_routing.artifacts, sglang_moe_routing.policies
import sglang_moe_routing.config, sglang_moe_routing.cli, sglang_moe_routing.testing
import sglang_moe_routing.integration.plugin, sglang_moe_routing.integration.recorder
sglang_moe_routing.integration.plugin.register()
"""


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a module imports."""
    package = ("sglang_moe_routing", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, node.module or ""]).rstrip("."))
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_integration_imports_sglang(path: Path) -> None:
    names = {name for name in imports(path) if name.split(".")[0] == "sglang"}
    assert not names or room(path) == "integration"


MAY_IMPORT = {
    "errors": set(),
    "checkpoint": {"errors"},
    "artifacts": {"errors", "checkpoint"},
    "text": {"errors"},
    "calibration": {"errors", "artifacts", "checkpoint", "text"},
    "policies": {"errors"},
    "kernels": {"errors", "policies"},
    "config": {"errors", "policies"},
    "testing": {"errors", "policies"},
    "similarity": {"errors", "artifacts", "policies", "config"},
    "integration": {
        "errors",
        "checkpoint",
        "artifacts",
        "policies",
        "kernels",
        "config",
        "similarity",
    },
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_rooms_do_not_know_higher_ones(path: Path) -> None:
    allowed = MAY_IMPORT.get(room(path))
    if allowed is None:
        return  # top of the tree
    used = {name.split(".")[1] for name in imports(path) if name.startswith("sglang_moe_routing.")}
    assert used <= allowed | {room(path)}


@pytest.mark.parametrize("name", ["oracle.py", "calls.py"])
def test_the_oracle_shares_nothing_with_what_it_is_held_against(name: str) -> None:
    used = {n for n in imports(PACKAGE / "testing" / name) if n.startswith("sglang_moe_routing")}
    allowed = {"sglang_moe_routing.errors", "sglang_moe_routing.testing"}
    assert used <= (allowed if name == "calls.py" else set())


def test_package_imports_without_sglang() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_SGLANG], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
