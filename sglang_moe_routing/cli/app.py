"""Commands of ``sglang-moe-routing``; each lives in a file of its own."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .build import build
from .calibrate import calibrate
from .check import check
from .client import client
from .configs import policies, validate
from .demo import demo
from .evaluate import evaluate
from .inspect import inspect
from .serve import serve
from .tune import tune

app = typer.Typer(
    name="sglang-moe-routing",
    help="Serve Mixture-of-Experts models with per-request expert re-routing on SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    # as Ctrl-C does: a command that is ended must not leave a server behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help"],
    }
)(serve)
app.command()(validate)
app.command()(policies)
app.command()(calibrate)
app.command()(inspect)
app.command()(check)
app.command()(build)
app.command()(demo)
app.command(context_settings={"allow_extra_args": True})(evaluate)
app.command(context_settings={"allow_extra_args": True})(tune)
app.add_typer(bench)
app.command()(client)
