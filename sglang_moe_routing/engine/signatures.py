"""Signatures of SGLang's symbols as text: those of supported releases, and of what is installed.

One generated file per supported release (``scripts/make_signatures.py``) holds every symbol that we
hook or rely on. What is installed must equal the file of its release; for another release, the
difference to the nearest file is what a port has to look at.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import pkgutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from .. import environment
from ..errors import EngineError
from .report import Finding

FOLDER = Path(__file__).with_name("releases")


@dataclass(frozen=True)
class Release:
    """What this package knows of a release of SGLang.

    Attributes:
        name: its version.
        symbols: the lines of each symbol's signature, by dotted path.
        flags: fields of its `ServerArgs`.
        variables: environment variables that its MoE, router, graph and scheduler code reads.
    """

    name: str
    symbols: dict[str, list[str]]
    flags: list[str]
    variables: list[str]

    @classmethod
    def read(cls, name: str) -> Release:
        return cls(name, **json.loads((FOLDER / f"{name}.json").read_text()))


def supported() -> list[str]:
    """The supported releases, oldest first."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=Version)


def installed() -> str:
    """Version of the installed sglang. Raises `EngineError` if there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        raise EngineError(f"sglang is not installed; run: {environment.INSTALL_SGLANG}") from None


def installed_release() -> Release:
    """What this package knows of the installed sglang.

    Raises:
        EngineError: it is missing, or not a supported release.
    """
    name = installed()
    if name not in supported():
        raise EngineError(
            f"sglang {name} is installed, but this package is written for "
            f"{' and '.join(supported())}; run: {environment.INSTALL_SGLANG}"
        )
    return Release.read(name)


def nearest_release(name: str) -> Release:
    """The newest supported release that is not newer than `name`, else the oldest."""
    older = [known for known in supported() if Version(known) <= Version(name)]
    return Release.read(older[-1] if older else supported()[0])


def compare(release: Release, targets: Collection[str]) -> list[Finding]:
    """Compare installed symbols with what they are in `release`."""
    return [_compare(release, target) for target in targets]


def _compare(release: Release, target: str) -> Finding:
    expected = release.symbols.get(target, [])
    try:
        found = signature(target)
    except (ImportError, AttributeError) as error:
        return Finding(target, f"not found in this sglang: {error}", diff=difference(expected, []))
    if found == expected:
        return Finding(target, "")
    if not expected:
        return Finding(target, f"is not in {release.name}.json: run scripts/make_signatures.py")
    problem = f"is not what it is in sglang {release.name}"
    return Finding(target, problem, diff=difference(expected, found))


def difference(expected: Sequence[str], found: Sequence[str]) -> list[str]:
    """A unified diff without its file names."""
    return list(difflib.unified_diff(expected, found, n=1, lineterm=""))[2:]


def signature(target: str) -> list[str]:
    """The signature of a function, or the fields and constructor of a class, line by line.

    It is read from the source, as it stands there: what the interpreter shows of annotations and
    defaults differs between versions of Python. Of anything else, its definition.

    Raises:
        ImportError, AttributeError: there is no such symbol.
    """
    module, name = _place(target)
    node = _definitions(module).get(name)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _function_lines(node)
    if isinstance(node, ast.ClassDef):
        return _class_lines(node)
    return [ast.unparse(node)] if node else ["exists"]


def find(target: str) -> Any:
    """The object itself: a function without wrappers and binding.

    Raises:
        ImportError, AttributeError: there is no such symbol.
    """
    path, _, name = target.rpartition(".")
    owner, found = pkgutil.resolve_name(path), pkgutil.resolve_name(target)
    if inspect.isclass(owner):
        found = inspect.getattr_static(owner, name)
    if isinstance(found, property):
        return found.fget
    return inspect.unwrap(getattr(found, "__func__", found))


def attributes(kind: type) -> Iterator[str]:
    """Names of a class, of its fields, and of what its methods assign to ``self``."""
    for base in kind.__mro__:
        yield from _own_names(base)
        node = _definitions(base.__module__).get(base.__qualname__)
        for part in ast.walk(node) if node else ():
            match part:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    yield name


def _place(target: str) -> tuple[str, str]:
    """Module and qualified name under which a symbol is defined."""
    found = find(target)
    if inspect.isclass(found) or inspect.isfunction(found):
        return found.__module__, found.__qualname__
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    if not inspect.isclass(owner):
        return path, name
    known = (base for base in owner.__mro__ if name in _own_names(base))
    base = next(known, owner)
    return base.__module__, f"{base.__qualname__}.{name}"


def _own_names(kind: type) -> set[str]:
    return {*vars(kind), *vars(kind).get("__annotations__", ())}


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """Every function, class and assigned name of a module's source, by qualified name."""
    found: dict[str, ast.stmt] = {}
    try:
        source = inspect.getsource(pkgutil.resolve_name(module))
    except (TypeError, OSError):  # built in
        return found
    _collect(ast.parse(source).body, "", found)
    return found


def _collect(body: Sequence[ast.stmt], prefix: str, found: dict[str, ast.stmt]) -> None:
    for node in body:
        for name in _names(node):
            found.setdefault(prefix + name, node)
        if isinstance(node, ast.ClassDef):
            _collect(node.body, f"{prefix}{node.name}.", found)
        elif isinstance(node, ast.If | ast.Try):
            _collect(node.body, prefix, found)
            _collect(node.orelse, prefix, found)


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def _class_lines(node: ast.ClassDef) -> list[str]:
    bases = ", ".join(map(ast.unparse, node.bases))
    lines = [f"class {node.name}({bases}):"]
    for part in node.body:
        if isinstance(part, ast.Assign | ast.AnnAssign):
            lines.append(f"    {ast.unparse(part)}")
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            lines += [f"    {line}" for line in _function_lines(part)]
    return lines


def _function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    end = f") -> {ast.unparse(node.returns)}" if node.returns else ")"
    parameters = [f"    {parameter}," for parameter in _parameters(node.args)]
    return [f"{kind} {node.name}(", *parameters, end]


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    given = [None] * (len(positional) - len(arguments.defaults))
    for i, (argument, default) in enumerate(
        zip(positional, [*given, *arguments.defaults], strict=True), start=1
    ):
        yield _parameter(argument, default)
        if i == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    return text if default is None else f"{text} = {ast.unparse(default)}"
