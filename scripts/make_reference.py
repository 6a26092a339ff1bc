"""Write docs/configuration.md from the config models and reference.md.j2.

python scripts/make_reference.py [--check]    with --check: fail if the page is stale
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from sglang_moe_routing import environment
from sglang_moe_routing.config import json_schema
from sglang_moe_routing.config.schema import HEADER_PATTERN, NAME_PATTERN
from sglang_moe_routing.kernels import native
from sglang_moe_routing.policies import Schedule, builtin_registry

TEMPLATE = Path(__file__).with_name("reference.md.j2")
PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
COMMAND = "python scripts/make_reference.py"
COMMON = ("kind", "engage")  # keys of every kind, told once
CONSTANTS = {
    "PLATFORM",
    "PLUGIN",
    "FORCED_TOKENS",
    "SGLANG",
    "INSTALL_SGLANG",
    "EXIT_CODE",
    "RELOAD_TOKEN",
    "TARGET_ARCHITECTURES",
}  # not names of variables

SECTIONS = {
    name: f"[{name.lower()}](#{name.lower()})"
    for name in ("Engagement", "Metrics", "Reload", "Isolation")
}
MAPPINGS = {
    "rows": "rows → value",
    "layers": "layers → value",
    "api_keys": "SHA-256 → name",
}


def render() -> str:
    """The whole page."""
    registry = builtin_registry()
    schema = json_schema(registry)
    engine = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = engine.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        command=COMMAND,
        template=f"scripts/{TEMPLATE.name}",
        name_pattern=NAME_PATTERN,
        schema=schema,
        defs=schema["$defs"],
        kinds=[schema["$defs"][model.__name__] for model in registry.classes()],
        schedule={"description": inspect.cleandoc(Schedule.__doc__ or "")},
        variables=[*_variables(environment), *_variables(native)],
        kind_names=_either(registry),
        paragraph=_paragraph,
        rows=_rows,
        text=_text,
    )


def is_fresh() -> bool:
    """Whether the page on disk is what the models say."""
    return PAGE.exists() and PAGE.read_text(encoding="utf-8") == render()


def _rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Key, type, default and meaning of each key; of a policy those that not every kind has."""
    required, properties = model.get("required", ()), model["properties"]
    rows = [
        (
            f"`{key}`",
            _type(field, key),
            "required" if key in required else _default(field),
            _text(field) or "The value where nothing below says otherwise.",
        )
        for key, field in properties.items()
        if "kind" not in properties or key not in COMMON
    ]
    return [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]


def _type(field: Mapping[str, Any], key: str = "") -> str:
    """What may be written there, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return SECTIONS.get(name, "[schedule](#schedules)")
    if key == "layers" and "anyOf" in field:
        return "layers"
    if "anyOf" in field or "oneOf" in field:
        either = field.get("anyOf") or field["oneOf"]
        options = [option for option in either if option.get("type") != "null"]
        return ", or ".join(dict.fromkeys(_type(option) for option in options))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return _either(field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}s"
    if field["type"] == "object":
        return _mapping(field, key)
    if field["type"] == "string":
        pattern = field.get("pattern")
        known = {None: "text", f"^{NAME_PATTERN}$": "name", HEADER_PATTERN: "header name"}
        return known.get(pattern, f"text like `{pattern}`")
    words = {"integer": "integer", "number": "number", "boolean": "`true` or `false`"}
    return words[field["type"]] + _range(field)


def _mapping(field: Mapping[str, Any], key: str) -> str:
    if key == "policies":
        values = list(field.get("patternProperties", {}).values())
        is_group = values and values[0].get("type") == "string"
        return "name → name" if is_group else "name → [policy](#policies)"
    if key == "similarity":
        return "name → path or [source](#similarity-artifacts)"
    return MAPPINGS[key]


def _range(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]}" for name, sign in signs.items() if name in field]
    return f" {' and '.join(limits)}" if limits else ""


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, Mapping) and "default" in value:
        value = value["default"]  # a schedule that is the same everywhere
    if value is None:
        return "none"
    if value == {} or "$ref" in field:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _either(values: Iterable[str]) -> str:
    return " or ".join(f"`{value}`" for value in values)


def _paragraph(model: Mapping[str, Any], more: str = "") -> str:
    text = f"{_text(model)} {more}".strip()
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def _text(model: Mapping[str, Any]) -> str:
    """A docstring as one Markdown paragraph."""
    text = " ".join(model.get("description", "").split())
    return re.sub(r"``([^`]*)``", r"`\1`", text)


def _variables(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Name and docstring of every variable that the module names."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in itertools.pairwise(body):
        if not isinstance(statement, ast.Assign) or not isinstance(following, ast.Expr):
            continue
        (target,) = statement.targets
        if isinstance(target, ast.Name) and target.id not in CONSTANTS:
            docstring = ast.literal_eval(following.value)
            yield f"`{getattr(module, target.id)}`", _text({"description": docstring})


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(render(), encoding="utf-8")
    elif not is_fresh():
        print(f"{PAGE} is stale; run: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
