"""``build``: compile the kernels ahead of their first use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..kernels import TARGET_ARCHITECTURES, build_cpu, build_cuda
from .output import Json, clear_errors, print_json, say


def build(
    arch: Annotated[
        str | None,
        typer.Option(
            help="CUDA compute capabilities, such as '8.0 9.0', or 'all' for "
            f"{' '.join(TARGET_ARCHITECTURES)}. Needs nvcc, no GPU. Absent: CPU kernels only."
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option(help="Compile the CPU kernels.")] = True,
    json: Json = False,
) -> None:
    """Compile the kernels into the cache, for an image or a machine without a compiler."""
    folders: dict[str, Path] = {}
    with clear_errors():
        if cpu:
            folders["cpu"] = build_cpu()
        if arch is not None:
            wanted = TARGET_ARCHITECTURES if arch == "all" else arch.replace(",", " ").split()
            folders["cuda"] = build_cuda(wanted)
    if json:
        print_json({backend: str(folder) for backend, folder in folders.items()})
        return
    for backend, folder in folders.items():
        say(f"{backend}: {folder}")
