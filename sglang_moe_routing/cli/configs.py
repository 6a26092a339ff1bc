"""``validate`` and ``policies``: look at routing configs without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import LoadedConfig, bundled_config, load_config
from ..errors import RoutingError
from ..policies import installed_registry
from ..runtime.similarity import load_similarities
from .output import Json, clear_errors, console, print_json, say

ConfigFile = Annotated[Path, typer.Argument(help="Routing config (YAML).")]


def validate(
    file: ConfigFile,
    artifacts: Annotated[
        bool, typer.Option(help="Also open and check the similarity artifacts.")
    ] = True,
    json: Json = False,
) -> None:
    """Check a routing config; exit status 1 and every problem if it cannot be served."""
    try:
        loaded = load_config(file)
        if artifacts:
            load_similarities(loaded)
    except RoutingError as error:
        if json:
            print_json({"ok": False, "file": str(file), "problems": str(error).splitlines()})
            raise typer.Exit(1) from None
        with clear_errors():
            raise
    if json:
        print_json({"ok": True, "file": str(file), "policies": list(loaded.config.names)})
    else:
        say(f"{file}: ok; policies: {', '.join(loaded.config.names)}")


def policies(
    file: Annotated[
        Path | None, typer.Argument(help="Routing config (YAML); configs/default.yaml if absent.")
    ] = None,
    json: Json = False,
) -> None:
    """List the policies of a routing config, and the kinds that can be configured."""
    with clear_errors():
        loaded = load_config(file or bundled_config("default.yaml"))
        kinds = {k: _summary(installed_registry()[k].__doc__) for k in installed_registry()}
    rows = _describe(loaded)
    if json:
        print_json({"file": str(loaded.path), "policies": rows, "kinds": kinds})
        return
    table = Table("policy", "kind", "parameters", "engaged", "clients", title=str(loaded.path))
    for row in rows:
        name = f"{row['name']} (default)" if row["default"] else row["name"]
        parameters = ", ".join(f"{k}={_brief(v)}" for k, v in row["parameters"].items())
        engaged = ", ".join(f"{k}={v}" for k, v in row["engage"].items())
        table.add_row(name, row["kind"], parameters, engaged, "yes" if row["choosable"] else "no")
    console.print(table)
    listed = Table("kind", "what it does", title="kinds")
    for kind, text in kinds.items():
        listed.add_row(kind, text)
    console.print(listed)


def _describe(loaded: LoadedConfig) -> list[dict[str, Any]]:
    config = loaded.config
    rows = []
    for name, policy in zip(config.names, config.definitions, strict=True):
        parameters = policy.model_dump(mode="json", exclude={"kind", "engage"}, exclude_unset=True)
        artifact = config.artifact_of(name)
        rows.append(
            {
                "name": name,
                "kind": policy.kind,
                "default": name == config.default,
                "choosable": name in config.choosable,
                "parameters": parameters | ({"similarity": artifact} if artifact else {}),
                "engage": policy.engage.model_dump(mode="json", exclude_none=True),
            }
        )
    return rows


def _brief(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"default"}:
        return str(value["default"])
    return str(value)


def _summary(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0] if docstring else ""
