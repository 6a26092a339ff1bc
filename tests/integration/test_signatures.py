"""The generated files of SGLang's releases."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import make_signatures
from sglang_moe_routing import environment
from sglang_moe_routing.engine import signatures

pytest.importorskip("sglang")
from sglang_moe_routing.integration.hooks import entries

MODULE = "releases_example"
SOURCE = """
import functools

class Base:
    size: int = 3

class Kind(Base):
    name: str
    other = 'x'
    def __init__(self, a, /, b: int = 1, *rest, c, d=None, **more) -> None:
        self.assigned: int = a
        if a:
            self.nested = a.foreign = b
    async def run(self, *, to: str) -> list[str]: ...
    @classmethod
    def make(cls, n): ...
    @property
    def width(self) -> int: return 1

@functools.wraps(print)
def wrapped(*args): ...
wrapped.__wrapped__ = Kind.run

answer = Base()
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    signatures._definitions.cache_clear()


def test_the_file_of_the_installed_release_is_current() -> None:
    path = signatures.FOLDER / f"{signatures.installed()}.json"
    current = json.loads(json.dumps(make_signatures.current()))
    assert json.loads(path.read_text()) == current, "run: python scripts/make_signatures.py"


def test_every_release_has_every_symbol() -> None:
    targets = {entry.target for entry in entries()}
    for name in signatures.supported():
        assert set(signatures.Release.read(name).symbols) == targets


def test_the_requirement_covers_the_supported_releases_and_no_others() -> None:
    lowest, highest = re.fullmatch(  # type: ignore[union-attr]
        r"sglang>=([\d.]+),<([\d.]+)", environment.SGLANG
    ).groups()
    *_, newest = supported = signatures.supported()
    assert lowest == supported[0]
    *start, last = newest.split(".")
    assert highest == ".".join([*start, str(int(last) + 1)])


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        ("Kind.run", ["async def run(", "    self,", "    *,", "    to: str,", ") -> list[str]"]),
        ("Kind.make", ["def make(", "    cls,", "    n,", ")"]),
        ("Kind.width", ["def width(", "    self,", ") -> int"]),
        ("wrapped", ["async def run(", "    self,", "    *,", "    to: str,", ") -> list[str]"]),
        ("Kind.size", ["size: int = 3"]),
        ("answer", ["answer = Base()"]),
        (
            "Kind",
            [
                "class Kind(Base):",
                "    name: str",
                "    other = 'x'",
                "    def __init__(",
                "        self,",
                "        a,",
                "        /,",
                "        b: int = 1,",
                "        *rest,",
                "        c,",
                "        d = None,",
                "        **more,",
                "    ) -> None",
            ],
        ),
    ],
)
def test_signatures_are_those_of_the_source(target: str, lines: list[str]) -> None:
    assert signatures.signature(f"{MODULE}.{target}") == lines


def test_attributes_are_fields_inherited_ones_and_assignments() -> None:
    kind = signatures.find(f"{MODULE}.Kind")
    found = set(signatures.attributes(kind))
    assert {"size", "name", "other", "assigned", "nested", "width", "run"} <= found
    assert not {"a", "foreign"} & found


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("0.5.21", "0.5.22"), ("0.5.22.post1", "0.5.22"), ("0.5.24", "0.5.23"), ("1.0", "0.5.23")],
)
def test_another_release_is_compared_with_the_nearest(name: str, nearest: str) -> None:
    assert signatures.nearest_release(name).name == nearest


def test_an_older_release_differs_where_it_is_known_to() -> None:
    """What `check` shows to whoever ports."""
    old, new = (signatures.Release.read(name) for name in ("0.5.22", "0.5.23"))
    target = "sglang.srt.layers.moe.topk.TopKConfig"
    diff = signatures.difference(old.symbols[target], new.symbols[target])
    assert "-    num_fused_shared_experts: int = 0" in diff
    assert "+    shared_experts: SharedExpertsConfig = SharedExpertsConfig()" in diff
    assert not any(line.startswith(("---", "+++")) for line in diff)


def test_a_symbol_that_is_gone_is_shown_whole() -> None:
    release = signatures.Release("0.5.23", {f"{MODULE}.gone": ["def gone(", ")"]}, [], [])
    (finding,) = signatures.compare(release, release.symbols)
    assert "not found in this sglang" in finding.problem
    assert finding.diff[1:] == ["-def gone(", "-)"]


def test_modules_whose_names_are_made_on_demand_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy: Any = ModuleType("lazy_example")
    exec("def __getattr__(name):\n    return {'anything': 3}[name]", vars(lazy))
    lazy.__path__ = []
    monkeypatch.setitem(sys.modules, "lazy_example", lazy)
    assert signatures.find("lazy_example.anything") == 3


def test_a_symbol_that_a_release_file_lacks_is_told_from_a_modified_one() -> None:
    (finding,) = signatures.compare(
        signatures.installed_release(), ["sglang.srt.utils.auth.AuthLevel"]
    )
    assert finding.problem.endswith(".json: run scripts/make_signatures.py")
