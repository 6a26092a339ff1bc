"""``check``: everything a server checks at start-up, without starting one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint import find_checkpoint, moe_layers, read_headers
from ..config import bundled_config
from ..engine.report import Inspection
from ..errors import CheckpointError, RoutingError, describe
from ..policies import Sizes
from ..serving.server import server_environment
from .evaluate import model_sizes
from .options import ServedConfig
from .output import Json, console, print_json, say

_COLOURS = {"+": "green", "-": "red"}


def check(
    routing_config: ServedConfig = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint that the policies must fit, a folder or in the local cache."),
    ] = None,
    json: Json = False,
) -> None:
    """Check sglang, the hooked symbols, platform, kernels and config; status 1 on a problem."""
    path = routing_config or bundled_config("default.yaml")
    problems = []
    try:
        os.environ.update(server_environment(path))  # before sglang is imported
    except RoutingError as error:
        problems.append(str(error))
    sizes = None
    try:
        sizes = None if model is None else moe_sizes(model)
    except RoutingError as error:
        problems.append(str(error))
    result = Inspection(config=str(path))
    try:
        result = _inspect(path, sizes)
    except (ImportError, OSError, RuntimeError) as error:
        problems = problems or [describe(error)]
    problems += [problem for problem in result.problems if problem not in problems]
    hooks = [
        {"target": f.target, "ok": f.ok, "problem": f.problem, "diff": list(f.diff)}
        for f in result.findings
    ]
    if json:
        print_json(
            {
                "ok": not problems,
                "sglang": result.sglang,
                "hooks": hooks,
                "platform": result.platform,
                "kernels": result.kernels,
                "kernels_reason": result.kernels_reason,
                "config": {"file": result.config, "policies": list(result.policies)},
                "warnings": list(result.warnings),
                "problems": problems,
            }
        )
    else:
        table = Table("what", "found", show_header=False)
        table.add_row("sglang", result.sglang or "not usable")
        good = sum(f.ok for f in result.findings)
        known = f"as in {result.compared_with}" if result.compared_with else "as expected"
        table.add_row("SGLang symbols", f"{good} of {len(result.findings)} {known}")
        table.add_row("platform", result.platform)
        kernels = f"{result.kernels} ({result.kernels_reason})" if result.kernels else "not usable"
        table.add_row("kernels", kernels)
        table.add_row("config", f"{result.config}: {', '.join(result.policies) or 'not usable'}")
        console.print(table)
        for line in (line for finding in result.findings for line in finding.lines()):
            say(line, style=_COLOURS.get(line.strip()[:1]))
        for warning in result.warnings:
            say(f"warning: {warning}", style="yellow")
        for problem in problems:
            say(f"problem: {problem}", style="red")
        if not problems:
            console.print("all good", style="green")
    raise typer.Exit(1 if problems else 0)


def moe_sizes(model: str) -> dict[int, Sizes]:
    """The model's MoE layers, read from its config and its checkpoint's headers.

    Raises:
        RoutingError: they cannot be read.
    """
    num_experts, top_k = model_sizes(model, trust_remote_code=False)
    layers = moe_layers(read_headers(find_checkpoint(model)))
    if not layers:
        raise CheckpointError(f"{model}: the checkpoint has no MoE layers")
    return dict.fromkeys(layers, Sizes(top_k, num_experts))


def _inspect(path: Path, model: Mapping[int, Sizes] | None) -> Inspection:
    if importlib.util.find_spec("sglang") is None:
        return Inspection(config=str(path))
    from ..integration.inspection import inspect

    return inspect(path, model)
