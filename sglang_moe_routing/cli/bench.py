"""``bench``: measure parts of the package on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.table import Table

from .bench_layer import layer
from .bench_serve import serve
from .output import Json, clear_errors, console, numbers, print_json

bench = typer.Typer(name="bench", help="Measure parts of the package.", no_args_is_help=True)
bench.command(context_settings={"allow_extra_args": True})(serve)
bench.command()(layer)


@bench.command()
def op(
    rows: Annotated[str, typer.Option(help="Rows (tokens) of a call.")] = "1,4,16,64,256,512",
    experts: Annotated[str, typer.Option(help="Experts of the layer.")] = "64,128,256,512",
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the router logits.")
    ] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Either cpu or cuda; cuda if present.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=2)] = 15,
    threads: Annotated[int, typer.Option(help="Threads of torch on a CPU.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Time the re-routing beside the engine's top-k and the torch reference."""
    import torch

    from ..bench import ops

    torch.set_num_threads(threads)
    with clear_errors():
        timings = list(
            ops.run(
                numbers(rows, "--rows"),
                numbers(experts, "--experts"),
                top_k=top_k,
                dtype=getattr(torch, dtype),
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                rounds=rounds,
            )
        )
    if json:
        print_json(ops.summary(timings))
        return
    table = Table("device", "rows", "experts", "us", "+-", "engine top-k us", "reference us")
    for timing in timings:
        figures = (timing.median_us, timing.spread_us, timing.engine_topk_us, timing.reference_us)
        table.add_row(
            timing.device,
            str(timing.rows),
            str(timing.experts),
            *(f"{number:.1f}" for number in figures),
        )
    console.print(table)
