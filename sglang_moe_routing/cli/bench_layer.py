"""``bench layer``: time of one MoE layer against its number of active experts."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from .output import (
    Json,
    check_matplotlib,
    clear_errors,
    command_line,
    console,
    errors,
    numbers,
    print_json,
)


def layer(
    shapes: Annotated[str, typer.Option(help="Models whose MoE layer to take.")] = "qwen3-30b-a3b",
    impls: Annotated[
        str | None, typer.Option(help="Implementations; ours and every peer by default.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PYTHON", help="A peer's interpreter; repeatable."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows (tokens) of a call.", min=1)] = 16,
    active_experts: Annotated[
        str | None, typer.Option(help="Numbers T of active experts; a range by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=3)] = 15,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each implementation; the cores by default.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Type of weights and hidden states.")
    ] = "bfloat16",
    out: Annotated[
        Path | None, typer.Option(help="Folder for layer.json and layer.png.", file_okay=False)
    ] = None,
    json: Json = False,
) -> None:
    """Time one MoE layer on this CPU against its number of active experts."""
    from ..cpu import bench_layer as bench
    from ..cpu import bench_layer_plot as layer_plot
    from ..serving.machine import describe_machine

    with clear_errors():
        names = _names(shapes)
        pythons = bench.interpreters(_names(impls) if impls else None, _peers(peer or []), names)
        if out is not None:
            check_matplotlib("--out")
        found: dict[str, Any] = {
            "machine": describe_machine(),
            "load_average": round(os.getloadavg()[0], 2),
            "command": command_line(),
        }
        with errors.status("starting") as status:
            measurement = bench.run(
                names,
                pythons,
                rows=rows,
                active_experts=numbers(active_experts, "--active-experts")
                if active_experts
                else None,
                rounds=rounds,
                threads=threads or len(os.sched_getaffinity(0)),
                dtype=dtype,
                report=status.update,
            )
        found |= bench.summary(measurement)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            text = json_module.dumps(found, indent=1) + "\n"
            (out / "layer.json").write_text(text, encoding="utf-8")
            layer_plot.draw(found, out / "layer.png")
    if json:
        print_json(found)
        return
    for name in names:
        console.print(_times(name, found))
    console.print(_fits(found))


def _times(shape: str, found: Mapping[str, Any]) -> Table:
    """Milliseconds and share of the streaming-read rate, T by implementation."""
    impls = list(found["fit"][shape])
    cases = {
        (case["active_experts"], case["impl"]): case
        for case in found["cases"]
        if case["shape"] == shape
    }
    stream = found["shape_stream_gb_s"][shape]
    table = Table("T", *impls, title=f"{shape}: ms (share of {stream} GB/s)")
    for count in sorted({count for count, _ in cases}):
        row = [cases[count, impl] for impl in impls]
        cells = (f"{case['median_ms']:.2f} ({case['stream_fraction']:.0%})" for case in row)
        table.add_row(str(count), *cells)
    return table


def _fits(found: Mapping[str, Any]) -> Table:
    table = Table("shape", "implementation", "fixed ms", "ms per expert", "limit", "R²")
    for shape, fits in found["fit"].items():
        limit = found["expert_bytes"][shape] / found["shape_stream_gb_s"][shape] / 1e6
        for impl, fit in fits.items():
            if fit is not None:
                figures = (fit["fixed_ms"], fit["per_expert_ms"], limit)
                cells = (f"{number:.4g}" for number in figures)
                table.add_row(shape, impl, *cells, f"{fit['r2']:.4f}")
    return table


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _peers(pairs: list[str]) -> dict[str, str]:
    peers = {}
    for pair in pairs:
        name, found, python = pair.partition("=")
        if not found or not python:
            raise typer.BadParameter(f"--peer {pair!r}: expected NAME=PYTHON")
        peers[name] = python
    return peers
