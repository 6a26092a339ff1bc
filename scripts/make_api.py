"""Write docs/api.md from the docstrings of the public names. --check fails if it is stale."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "sglang_moe_routing"

INTRODUCTION = """\
<!-- Written by scripts/make_api.py from docstrings; do not edit. -->
# Python names that you may rely on

These names keep their meaning until the [changelog](../CHANGELOG.md) says otherwise. All others are
the package's own. `import sglang_moe_routing` needs neither sglang nor a GPU. Kinds of policies and
their fields are in [configuration.md](configuration.md), which kinds of your own need in
[add-a-policy.md](add-a-policy.md).
"""

PUBLIC: Mapping[str, Sequence[str]] = {
    PACKAGE: (
        *("SimilarityArtifact", "load_artifact", "save_artifact"),
        *("RoutingError", "ArtifactError", "ConfigError", "EngineError", "PolicyError"),
        "RoutingRequestError",
    ),
    f"{PACKAGE}.config": ("load_config", "LoadedConfig"),
    f"{PACKAGE}.policies": (
        *("Policy", "PolicyRegistry", "builtin_registry", "installed_registry"),
        *("Place", "Rule", "Compensated", "Mapped", "TorchPolicy", "Rows"),
        *("Router", "PolicyTable", "build_table", "FreeSlots", "reroute", "Rerouted"),
    ),
    f"{PACKAGE}.kernels": ("refine", "BoundLayer", "workspace"),
    f"{PACKAGE}.testing": ("check_policy", "check_calls", "read_records", "Checked"),
}
"""What the page lists, by the module to import it from."""
OPTIONS = {
    "warnings": False,  # one line may speak of two parameters
    "returns_multiple_items": False,
    "returns_named_value": False,
}


def page() -> str:
    package = griffe.load(
        PACKAGE, search_paths=[ROOT], docstring_parser="google", docstring_options=OPTIONS
    )
    parts = [INTRODUCTION]
    for module, names in PUBLIC.items():
        inside = package if module == PACKAGE else package[module.removeprefix(f"{PACKAGE}.")]
        parts += [f"## {module}\n", *(part for name in names for part in entry(inside[name], 3))]
    return "\n".join(parts)


def entry(found: griffe.Object | griffe.Alias, level: int) -> Iterator[str]:
    """A heading, the signature, the docstring, and the same for a class's own methods."""
    if found.docstring is None:
        raise ValueError(f"{found.path} is public and has no docstring")
    yield f"{'#' * level} {found.name}\n"
    if found.is_function or (found.is_class and found.parameters):
        yield f"```text\n{signature(found)}\n```\n"
    yield from map(section, found.docstring.parsed)
    if not found.is_class:
        return
    yield from fields(found)
    for name, member in found.members.items():
        if not name.startswith("_") and member.is_function and member.docstring is not None:
            yield from entry(member, level + 1)


def fields(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Fields that are described where they stand."""
    lines = [
        f"- `{name}: {member.annotation}`: {' '.join(member.docstring.value.split())}"
        for name, member in found.members.items()
        if not name.startswith("_") and member.is_attribute and member.docstring is not None
    ]
    if lines:
        yield "\n".join(["Fields:\n", *lines, ""])


def signature(found: griffe.Object | griffe.Alias) -> str:
    """As it is written, one parameter a line where it is long."""
    parameters = list(_parameters(found))
    returns = found.returns if found.is_function else None
    end = f") -> {returns}" if returns else ")"
    line = f"{found.name}({', '.join(parameters)}{end}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{found.name}(", *(f"    {part}," for part in parameters), end])


def _parameters(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    is_keyword = False
    for parameter in found.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not is_keyword:
            is_keyword = True
            yield "*"
        text = parameter.name
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None:
            text += f" = {parameter.default}"
        yield text


def section(part: griffe.DocstringSection) -> str:
    """A section in Markdown: text as it is, the others as lists."""
    if part.kind is griffe.DocstringSectionKind.text:
        return f"{part.value}\n"
    title = part.title or part.kind.value.title()
    lines = [f"{title}:\n"]
    for item in part.value:
        name = getattr(item, "name", "") or str(item.annotation or "")
        if name.endswith(","):  # of two names the parser takes the second for a type
            name += f" {item.annotation}"
        text = " ".join(item.description.split())
        lines.append(
            f"- `{name}`: {text}" if name and part.kind.value != "returns" else f"- {text}"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    text = page().rstrip() + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE} is stale; run: python scripts/make_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
