"""``serve``: start SGLang's own server with routing policies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import environment
from ..config import bundled_config, load_config
from ..errors import CheckpointError, EngineError
from ..integration import listening
from ..serving.server import flag_value, server_command, server_environment
from .options import Cpu, ServedConfig
from .output import clear_errors, errors, say

DEFAULT_HOST = "127.0.0.1"
"""SGLang's, where no ``--host`` is given."""


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or Hugging Face name.")],
    routing_config: ServedConfig = None,
    cpu: Cpu = None,
    cpu_experts: Annotated[
        Literal["auto", "native", "torch"],
        typer.Option(
            help="What runs the experts on the portable CPU platform: the compiled runner, or a "
            "loop of library products.",
            envvar=environment.CPU_EXPERTS,
        ),
    ] = "auto",
) -> None:
    """Start SGLang's server; every other option is passed on to SGLang.

    Example: sglang-moe-routing serve Qwen/Qwen3-30B-A3B --routing-config oea.yaml --tp 2
    """
    with clear_errors():
        path = routing_config or bundled_config("default.yaml")
        loaded = load_config(path)
        env = server_environment(path, context.args, cpu=cpu)
        env[environment.CPU_EXPERTS] = cpu_experts
        command = server_command(model, context.args)
        _refuse_what_cannot_start(model, context.args)
    names = ", ".join(loaded.config.names)
    platform = env.get("SGLANG_PLATFORM") or "SGLang's own"
    say(
        f"routing config {loaded.path}; policies: {names}; default: {loaded.config.default}; "
        f"platform: {platform}",
        to=errors,
    )
    os.execve(command[0], command, env)  # noqa: S606  # becomes the server: signals reach it


def _refuse_what_cannot_start(model: str, flags: Sequence[str]) -> None:
    """Say at once what SGLang would say after its imports, or on hundreds of lines."""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise CheckpointError(f"{model}: no such model folder")
    for flag in flags:
        if flag.startswith("--routing"):
            raise EngineError(f"{flag}: unknown option; did you mean --routing-config?")
    port = flag_value(flags, ("--port",))
    if port.isdecimal():
        listening.refuse_taken(flag_value(flags, ("--host",)) or DEFAULT_HOST, int(port))
