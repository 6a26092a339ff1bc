"""The documents say what the code says: symbols, refusals, commands, links and examples."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
import yaml

from scripts import make_reference
from sglang_moe_routing import environment
from sglang_moe_routing.cli import app
from sglang_moe_routing.config import BODY_ITEMS, BODY_PLACES, load_config
from sglang_moe_routing.engine import signatures
from sglang_moe_routing.integration import settings
from sglang_moe_routing.kernels import MAX_EXPERTS, MAX_GROUPS, MAX_TOP_K, native
from tests.examples import example_registry

ROOT = Path(__file__).parents[2]
INTEGRATION = ROOT / "sglang_moe_routing" / "integration"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TESTED = re.compile(
    r"<!-- tested(?:: (\S+))? -->\n```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S
)


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tables(text: str) -> Iterator[list[str]]:
    """Cells of every table row."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def first_cells(text: str) -> set[str]:
    """Every name in backquotes in the first column of a table."""
    return {name for row in tables(text) for name in re.findall(r"`([^`]+)`", row[0])}


def section(text: str, heading: str) -> str:
    """A section with its sub-sections, without its heading."""
    level = heading.split()[0]
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"no section {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def hook_targets() -> set[str]:
    """Targets of the `Hook(...)` calls in the sources, which import sglang."""
    found = set()
    for path in (ROOT / "sglang_moe_routing").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Hook":
                (target,) = (k.value for k in node.keywords if k.arg == "target")
                found.add(ast.literal_eval(target))
    return found


def test_architecture_lists_exactly_the_hooked_symbols() -> None:
    assert len(hook_targets()) > 10
    assert first_cells(section(read("architecture.md"), "## Hooked symbols")) == hook_targets()


def test_limits_list_exactly_the_refused_settings() -> None:
    flags = {f"--{name.replace('_', '-')}": r for name, r in settings.REFUSED_FLAGS.items()}
    refused = {**flags, **settings.REFUSED_VARIABLES}
    listed = section(read("limits.md"), "## Refused: server settings")
    rows = [row for row in tables(listed) if row[0].startswith("`")]
    assert {row[0].strip("`"): tuple(row[1:]) for row in rows} == {
        name: (refusal.when.text, refusal.reason) for name, refusal in refused.items()
    }


def test_http_lists_exactly_the_places_of_a_body_that_count() -> None:
    listed = first_cells(section(read("http.md"), "### Places in a body"))
    assert listed | {""} == {*BODY_PLACES, f"{BODY_ITEMS}[]"}


def test_limits_name_every_default_of_the_cpu_platform() -> None:
    from sglang_moe_routing.serving.server import server_environment

    env = server_environment(None, ["--tp", "2"], cpu=True, base={})
    listed = first_cells(section(read("limits.md"), "## The portable CPU platform"))
    assert listed == set(env)
    assert f"`{environment.PLATFORM}`" in read("limits.md")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_configs_in_documents_are_valid(page: Path, tmp_path: Path) -> None:
    for number, (language, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
        if language == "yaml" and "version" in (yaml.safe_load(text) or {}):
            file = tmp_path / f"{number}.yaml"
            file.write_text(text, encoding="utf-8")
            load_config(file, example_registry())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_marked_python_examples_print_what_they_say(page: Path, tmp_path: Path) -> None:
    for name, code, output in TESTED.findall(page.read_text(encoding="utf-8")):
        file = tmp_path / (name or "example.py")
        file.write_text(code, encoding="utf-8")
        run = subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout == output


def test_there_are_marked_examples() -> None:
    assert len(TESTED.findall(read("concepts.md"))) == 1


def test_all_python_examples_compile() -> None:
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                ast.parse(code)


def test_what_python_examples_import_of_this_package_is_there() -> None:
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                check_imports(ast.parse(code), page.name)


def check_imports(code: ast.Module, where: str) -> None:
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_moe"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{where}: {node.module}.{name.name}"


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every command by its full name, such as ``bench op``."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = command
    return found


def test_commands_and_options_are_those_of_the_program() -> None:
    program = commands(typer.main.get_command(app))
    text = read("cli.md")
    sections = set(re.findall(r"^## ([\w ]+)$", text, re.MULTILINE))
    assert sections == set(program)
    for name, command in program.items():
        listed = first_cells(section(text, f"## {name}"))
        options = {o for p in command.params for o in [*p.opts, *p.secondary_opts] if o[0] == "-"}
        assert {o for o in listed if o.startswith("--")} == options - {"--help"}, name


def test_commands_in_the_other_documents_exist() -> None:
    program = typer.main.get_command(app)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"sglang-moe-routing ([a-z]+)\b", text):
            assert name in program.commands, f"{page.name}: {name}"  # type: ignore[attr-defined]


def test_configuration_page_is_fresh() -> None:
    assert make_reference.is_fresh(), "run: python scripts/make_reference.py"


def test_configuration_page_names_every_variable() -> None:
    names = {environment.CONFIG, environment.CONFIG_SHA256}
    names |= {environment.RECORD, environment.EMULATE_GRAPHS, environment.CPU_EXPERTS}
    names |= {native.CHOICE, native.CACHE, native.INSTRUCTION_SET}
    assert names <= first_cells(section(read("configuration.md"), "## Environment variables"))


@pytest.mark.parametrize("page", ["limits.md", "kernels.md"])
def test_pages_name_the_limits_of_the_kernels(page: str) -> None:
    limits = f"{MAX_EXPERTS:,} experts, {MAX_TOP_K} experts per token (and|or) {MAX_GROUPS} "
    assert re.search(limits, " ".join(read(page).split()))


def test_documents_name_the_supported_releases() -> None:
    for page in (ROOT / "README.md", DOCS / "architecture.md", DOCS / "limits.md"):
        text = page.read_text(encoding="utf-8")
        assert [name for name in signatures.supported() if name not in text] == [], page


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.json")), ids=lambda path: path.name)
def test_figures_are_summaries_that_say_how_they_were_made(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 200
    summary = json.loads(text)
    for name in ("command", "config", "commit", "date", "machine"):
        assert summary[name], name
    assert "system" not in summary["machine"]


def test_what_is_said_to_be_tested_on_a_gpu_is_what_was_recorded() -> None:
    recorded = json.loads((DOCS / "bench/h100.json").read_text())
    said = section(read("limits.md"), "## Tested on")
    machine, tests = recorded["machine"], recorded["tests"]
    for found in (machine["accelerator"], machine["driver"], f"{tests['passed']} tests passed"):
        assert found in said
    for name, version in machine["versions"].items():
        assert re.search(rf"{name} {re.escape(version)}", said, re.I), name
