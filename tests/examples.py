"""The packages of docs/add-a-policy.md, installed as a user does, but without an index."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sglang_moe_routing.policies import Policy, PolicyRegistry, builtin_registry

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "add-a-policy"
PAGE = ROOT / "docs" / "add-a-policy.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The page's blocks in a language."""
    return [text for found, text in BLOCK.findall(PAGE.read_text()) if found == language]


def example_class() -> type[Policy]:
    """The example's policy, without installing it."""
    spec = importlib.util.spec_from_file_location("my_policies", EXAMPLE / "my_policies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_policies"] = module  # pydantic looks names up there
    spec.loader.exec_module(module)
    found: type[Policy] = module.Doubling
    return found


def example_registry() -> PolicyRegistry:
    """The built-in kinds and the example's."""
    registry = builtin_registry()
    registry.register(example_class())
    return registry


def torch_package(folder: Path) -> Path:
    """A package like the example, around the page's policy that is written in torch."""
    (code,) = (block for block in blocks("python") if "TorchPolicy" in block)
    package = folder / "torch-package"
    package.mkdir()
    project = (EXAMPLE / "pyproject.toml").read_text()
    for old, new in (
        ("my-policies", "torch-policies"),
        ("my_policies", "torch_policies"),
        ("doubling", "min_p"),
        ("Doubling", "MinP"),
    ):
        project = project.replace(old, new)
    (package / "pyproject.toml").write_text(project)
    (package / "torch_policies.py").write_text(code)
    return package


def install(package: Path, folder: Path) -> dict[str, str]:
    """Build `package` and install it under `folder`. Variables under which Python finds it."""
    source = folder / f"source-of-{package.name}"
    shutil.copytree(package, source)  # setuptools leaves files beside what it builds
    target = folder / f"installed-{package.name}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    path = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
