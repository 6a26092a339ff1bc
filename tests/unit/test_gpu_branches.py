"""Code that asks for the device runs elsewhere than on the machines that test it: all is listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from scripts import gpu_check

from .test_docs import ROOT, read, section, tables

PACKAGE = ROOT / "sglang_moe_routing"
ROOMS = ("cpu", "engine", "integration", "kernels", "runtime")
ATTRIBUTES = ("is_cuda", "is_cpu", "pin_memory")
CALLS = ("torch.cuda.", "torch.version.hip")
NAMES = ("cuda", "cpu")


def asks_for_a_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ATTRIBUTES or ast.unparse(node).startswith(CALLS)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Constant) and side.value in NAMES for side in sides)
    return False


def functions(node: ast.AST, name: str = "") -> Iterator[str]:
    """Qualified names of the functions below `node` that ask for a device."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{child.name}".lstrip(".")
        elif asks_for_a_device(child):
            yield name
        yield from functions(child, inner)


def found() -> set[str]:
    return {
        f"{path.relative_to(PACKAGE)}: {name}"
        for room in ROOMS
        for path in (PACKAGE / room).rglob("*.py")
        for name in functions(ast.parse(path.read_text(encoding="utf-8")))
    }


def listed() -> dict[str, str]:
    """What enters a function, by the function."""
    rows = [row for row in tables(section(read("kernels.md"), "### On a GPU")) if len(row) == 3]
    return {name: row[2] for row in rows[2:] for name in re.findall(r"`(\S+\.py: [\w.]+)`", row[0])}


def test_every_place_that_asks_for_a_device_is_listed() -> None:
    assert found() == set(listed())


def test_what_is_said_to_enter_it_exists() -> None:
    for name, entered in listed().items():
        tests = re.findall(r"`(tests/\S+\.py)(?:: (\w+))?`", entered)
        steps = re.findall(r"steps? `([\w ]+)`", entered)
        assert tests or steps, name
        assert set(steps) <= set(gpu_check.STEPS), name
        for path, test in tests:
            assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).exists()


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x.is_cuda",
        "def f(x): x.pin_memory()",
        "def f(d): return 1 if d.type == 'cuda' else 2",
        "def f(): torch.cuda.synchronize()",
        "class f:\n    pass\n    x = torch.cuda.device_count()",
        "def f(): return torch.version.hip",
    ],
)
def test_the_list_would_miss_nothing(code: str) -> None:
    assert list(functions(ast.parse(code))) == ["f"]
    assert not list(functions(ast.parse("def f(x): return x.device == y")))
