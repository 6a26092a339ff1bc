"""Read a routing config file. Every error names the file, the line, the key path and the value."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import ConfigError, shorten
from ..policies import PolicyRegistry, installed_registry
from ..policies.schedule import format_layers
from .schema import RoutingConfig, model_for

BUNDLED = "configs"
MOST_PROBLEMS = 100
"""So many are listed: aliases let a small file hold any number."""

_EXPECTED = dict.fromkeys(
    ("model_type", "model_attributes_type", "dict_type"), "Input should be keys with values"
)
"""Instead of pydantic's messages that name a Python class."""
_LONGEST_KEY = 64
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class LoadedConfig:
    """A validated config and the file it came from.

    Attributes:
        config: the validated content.
        path: the file.
        sha256: digest of the file's bytes.
        similarity_paths: artifact name -> absolute path, variables expanded.
    """

    config: RoutingConfig
    path: Path
    sha256: str
    similarity_paths: dict[str, Path]


def load_config(path: str | Path, registry: PolicyRegistry | None = None) -> LoadedConfig:
    """Read and validate a routing config.

    Args:
        registry: policy kinds that the file may use; all installed ones if absent.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema. Every problem
            of the file is listed.
        PolicyError: an installed policy package is broken.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the routing config: {error.strerror}") from None
    tree, content = _parse(path, raw)
    if content is None:
        raise ConfigError(f"{path}:1: the file is empty; it needs at least 'version: 1'")
    registry = registry or installed_registry()
    model = model_for(registry)
    try:
        config = model.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        problems = [_describe(e, model, registry, tree) for e in found[:MOST_PROBLEMS]]
        if len(found) > MOST_PROBLEMS:
            problems.append(f" and {len(found) - MOST_PROBLEMS} more")
        raise ConfigError("\n".join(f"{path}:{problem}" for problem in problems)) from None
    return LoadedConfig(
        config=config,
        path=path.absolute(),  # a link, as of a ConfigMap, may lead elsewhere at a reload
        sha256=hashlib.sha256(raw).hexdigest(),
        similarity_paths={
            name: _expand(path, tree, name, source.path)
            for name, source in config.similarity.items()
        },
    )


def bundled_config(name: str) -> Path:
    """Path of a ready-made config that ships with the package, such as ``default.yaml``."""
    package = Path(__file__).parents[1]
    for folder in (package / BUNDLED, package.parent / BUNDLED):  # wheel, checkout
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"no ready-made config {name!r} in this installation")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, which PyYAML silently overwrites.

    Merge keys (``<<``) are resolved among finished mappings, each built once: PyYAML's own way
    copies nodes, of which a few nested merges make billions.
    """

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.deep_construct = True  # what an alias leads to is finished

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own: dict[Hashable, Any] = {}
        merged: dict[Hashable, Any] = {}
        seen: set[Hashable] = set()
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE
            key = "<<" if is_merge else self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {shorten(key)} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
            if is_merge:
                merged = self._merge(value_node)
            else:
                own[key] = self.construct_object(value_node)
        return merged | own

    def _merge(self, node: yaml.Node) -> dict[Hashable, Any]:
        """What ``<<`` brings: of several mappings the first that has a key counts."""
        value = self.construct_object(node)
        merged: dict[Hashable, Any] = {}
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                raise yaml.MarkedYAMLError(
                    problem=f"'<<' merges mappings, got {shorten(source)}",
                    problem_mark=node.start_mark,
                )
            merged = source | merged
        return merged


def _parse(path: Path, raw: bytes) -> tuple[yaml.Node | None, Any]:
    try:
        return yaml.compose(raw, Loader=_Loader), yaml.load(raw, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {_cut(error.problem)}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_cut(error)}") from None


def _cut(message: object) -> str:
    """A message of PyYAML, which may quote a text of any length."""
    return str(message)[:200]


def _describe(
    error: ErrorDetails,
    model: type[BaseModel],
    registry: PolicyRegistry,
    tree: yaml.Node | None,
) -> str:
    """One line: ``line: key.path: what is wrong and what would be right``."""
    loc = list(error["loc"])
    is_key = loc[-1:] == ["[key]"]
    if is_key:
        loc.pop()
    if len(loc) > 1 and loc[0] == "clients_may_choose":
        loc.pop(1)  # the union tag that pydantic inserts
    if len(loc) > 2 and loc[0] == "policies":  # drop the union tag that pydantic inserts
        kind = str(loc.pop(2))
        known_fields = _fields(registry[kind], loc[2:-1])
    elif len(loc) > 2 and loc[0] == "similarity":
        known_fields = _fields(model, loc[:1])
    else:
        known_fields = _fields(model, loc[:-1])
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(str(loc[-1]), known_fields, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known_fields)}"
        message = f"unknown key, {hint}"
    elif error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        loc.append("kind")
        given = value.get("kind") if isinstance(value, dict) else None
        found = f"{shorten(given)} is not a policy kind" if given is not None else "missing"
        message = f"{found}; known: {', '.join(registry)}"
    elif error["type"] == "missing":
        message = "missing; this key is required"
    elif is_key:
        message = f"not a valid key: {message}"
    elif error["type"] != "value_error":
        message = f"{_EXPECTED.get(error['type'], message)}, got {shorten(value)}"
    if error["type"] == "value_error" and not loc:
        where, _, message = message.partition(": ")  # our own checks lead with the key path
        return f"{_line(tree, where.split('.'))}: {where}: {message}"
    where = ".".join(map(_key, loc)) or "the file"
    return f"{_line(tree, loc)}: {where}: {message}"


def _key(part: int | str) -> str:
    """A key as it may be written: ranges of layers were parsed to tuples of ids."""
    text = str(part)
    if re.fullmatch(r"\(\d+(, \d+)*,?\)", text):
        return format_layers(map(int, re.findall(r"\d+", text)))
    return text if len(text) <= _LONGEST_KEY else shorten(text)


def _fields(model: Any, loc: Sequence[int | str]) -> list[str]:
    """Field names of the (sub-)model that `loc` leads to."""
    for key in loc:
        field = getattr(model, "model_fields", {}).get(key)
        if field is None:
            return []
        model = next(_models(field.annotation), None)
    return list(getattr(model, "model_fields", {}))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _line(tree: yaml.Node | None, loc: Sequence[int | str]) -> int:
    """1-based line of the deepest node that `loc` leads to."""
    node, line = tree, 1
    for key in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = {k.value: (k, v) for k, v in node.value}
            if str(key) not in pairs:
                break
            key_node, node = pairs[str(key)]
            line = key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _expand(path: Path, tree: yaml.Node | None, name: str, value: str) -> Path:
    missing = [v for v in re.findall(r"\$\{(\w+)\}", value) if v not in os.environ]
    if missing:
        line = _line(tree, ["similarity", name])
        raise ConfigError(
            f"{path}:{line}: similarity.{name}: environment variable {missing[0]} "
            f"in {shorten(value)} is not set"
        )
    expanded = re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], value)
    return Path(os.path.abspath(path.parent / Path(expanded).expanduser()))
