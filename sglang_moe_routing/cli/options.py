"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import environment

Cpu = Annotated[
    bool | None,
    typer.Option(
        "--cpu/--no-cpu",
        help="Use the portable CPU platform; by default where there is no accelerator.",
    ),
]
ServedConfig = Annotated[
    Path | None,
    typer.Option(
        help="Routing config (YAML); configs/default.yaml if absent.", envvar=environment.CONFIG
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(help="Policies to compare, separated by commas; all choosable if absent."),
]
ApiKey = Annotated[str, typer.Option(help="API key of the server.", envvar="OPENAI_API_KEY")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")]
