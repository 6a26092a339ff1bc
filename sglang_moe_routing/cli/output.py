"""How commands speak: rich tables for people, one JSON object for programs, errors on stderr."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from ..errors import RoutingError, describe
from ..policies import Layers

console = Console()
errors = Console(stderr=True)

_LAYERS: TypeAdapter[tuple[int, ...]] = TypeAdapter(Layers)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout, unwrapped."""
    typer.echo(json.dumps(value, indent=2))


def command_line() -> str:
    """The running command for a result that others read: of absolute paths only the last part."""
    return shlex.join(["sglang-moe-routing", *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_without_folders(value)}"
    return Path(argument).name if argument.startswith("/") else argument


def say(text: str, *, to: Console = console, style: str | None = None) -> None:
    """Print `text` as it is: unwrapped, and nothing in it taken for markup."""
    to.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def rounded(value: float | None) -> str:
    """The cell of a table: a digit after the point, a dash where nothing is known."""
    return "-" if value is None else f"{value:.1f}"


def dense_table(title: str, first: str, columns: Iterable[str]) -> Table:
    """A table for ten columns in 80 characters: names in the first one, then figures.

    Args:
        columns: titles; a column without one holds text.
    """
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def showing_start(status: Status) -> Callable[[str], None]:
    """What shows the last line of a starting server's log."""
    return lambda line: status.update(f"starting the server: {line[:80]}")


def fail(message: str) -> NoReturn:
    """End the command with `message` and status 1."""
    errors.print("[bold red]error:[/]", end=" ")
    say(message, to=errors)
    raise typer.Exit(1)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn our own exceptions, and those of the environment, into one message."""
    try:
        yield
    except (RoutingError, ImportError, PermissionError) as error:
        fail(describe(error))


def check_matplotlib(option: str) -> None:
    """End the command if there is no matplotlib to draw what `option` asks for."""
    if importlib.util.find_spec("matplotlib") is None:
        fail(
            f"{option} draws with matplotlib, which is not installed: "
            "pip install 'sglang-moe-routing[plot]'"
        )


def numbers(text: str, option: str) -> list[int]:
    """What an option names as positive numbers, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{option} {text!r}: expected numbers such as 1,16,64")
    return [int(part) for part in parts]


def layer_ids(text: str) -> tuple[int, ...]:
    """What ``--layers`` names, in order. Raises `RoutingError` if it is no list of layers."""
    try:
        return _LAYERS.validate_python(text)
    except ValidationError:
        raise RoutingError(
            f"--layers {text!r}: no layer ids and ranges; write them as 0-3,7"
        ) from None
