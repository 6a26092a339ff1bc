"""Who may import whom, and that no files import each other in a circle."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sglang_moe_routing"
WITHOUT_SGLANG = """
import sys
sys.modules["sglang"] = None  # importing it raises ImportError
import sglang_moe_routing, sglang_moe_routing.artifacts, sglang_moe_routing.policies
import sglang_moe_routing.config, sglang_moe_routing.cli, sglang_moe_routing.bench.verify
import sglang_moe_routing.runtime, sglang_moe_routing.serving.server
import sglang_moe_routing.cpu.plugin, sglang_moe_routing.integration.plugin
sglang_moe_routing.cpu.plugin.activate()
sglang_moe_routing.integration.plugin.register()
"""


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path, root: Path = PACKAGE) -> set[str]:
    """Absolute names of everything that a module imports, those within functions included."""
    package = (root.name, *path.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, node.module or ""]).rstrip(".")
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def room(module: str) -> str:
    """The first part of a module's name below the package; `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


WITH_SGLANG = {"engine", "cpu", "integration"}
GROUND = {"errors", "environment", "checkpoint", "artifacts", "text"}
MAY_IMPORT = {
    "errors": set(),
    "environment": {"errors"},
    "checkpoint": {"errors"},
    "artifacts": {"errors", "checkpoint"},
    "text": {"errors"},
    "demo": set(),
    "testing": {"errors"},
    "calibration": {"errors", "artifacts", "checkpoint", "text", "__init__"},  # the version
    "policies": {"errors"},
    "kernels": {"errors", "policies"},
    "config": {"errors", "policies"},
    "runtime": {"policies", "kernels", "config", *GROUND - {"text"}},
    "engine": {"errors", "environment"},
    "serving": {"errors", "environment", "config"},
    "cpu": {"errors", "environment", "kernels", "engine", "serving", "demo"},
    "integration": {
        *("policies", "kernels", "config", "runtime", "engine", "cpu"),
        *GROUND - {"text"},
    },
    "evaluation": {"policies", "config", "serving", *GROUND},
    "bench": {"policies", "kernels", "config", "serving", "engine", *GROUND},
    "__init__": {"errors", "artifacts", "policies"},
    "__main__": {"cli"},
}
"""By room; `cli` knows them all but `plugin`, which nobody imports."""


def faults(modules: dict[str, Path], root: Path = PACKAGE) -> list[str]:
    """What breaks the rule, a line each."""
    graph = {
        name: {_module(found, modules) for found in imports(path, root)} - {None, name}
        for name, path in modules.items()
    }
    found = []
    for name, path in modules.items():
        allowed = MAY_IMPORT.get(room(name), set(MAY_IMPORT) - {"__main__"}) | {room(name)}
        found += [
            f"{name} imports {other}"
            for other in sorted(graph[name])
            if room(other) not in allowed or other.endswith(".plugin")
        ]
        if room(name) not in WITH_SGLANG and any(
            other.split(".")[0] == "sglang" for other in imports(path, root)
        ):
            found.append(f"{name} imports sglang")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


def _module(name: str, modules: dict[str, Path]) -> str | None:
    """The module of ours that `name` is or is in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_every_room_imports_what_it_may() -> None:
    assert faults(MODULES) == []


def test_every_room_has_a_rule() -> None:
    assert {room(name) for name in MODULES} - {"cli"} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "line", "fault"),
    [
        ("policies/budget.py", "from ..config import RoutingConfig", "policies.budget imports"),
        ("testing/planted.py", "from ..policies import Rule", "testing.planted imports"),
        ("runtime/rows.py", "import sglang", "runtime.rows imports sglang"),
        ("cpu/moe.py", "from ..policies import Rule", "cpu.moe imports"),
        ("integration/attach.py", "from .plugin import register", "attach imports"),
        ("runtime/plan.py", "def f():\n    from .process import current", "cycle: "),
        ("policies/rule.py", "from .base import Policy", "cycle: "),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, room: str, line: str, fault: str) -> None:
    root = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    planted = root / room
    planted.parent.mkdir(exist_ok=True)
    text = planted.read_text() if planted.exists() else ""
    planted.write_text(f"{text}\n{line}\n")
    modules = {name: root / path.relative_to(PACKAGE) for name, path in MODULES.items()}
    modules.setdefault(f"{PACKAGE.name}.{room.removesuffix('.py').replace('/', '.')}", planted)
    assert any(fault in found for found in faults(modules, root)), faults(modules, root)


def test_package_imports_without_sglang() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_SGLANG], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
