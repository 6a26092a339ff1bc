"""The picture of a similarity matrix: one heat map per MoE layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts import METRICS, SimilarityArtifact
from ..errors import ArtifactError
from .statistics import off_diagonal

INCHES = (7.2, 6.4)
COLOURS = "viridis"
DIAGONAL = "0.88"
CLIPPED = 0.01
TICKS = 16
TITLE_LETTERS = 46


def draw_all(artifact: SimilarityArtifact, folder: Path) -> Iterator[Path]:
    """Draw ``layer_<id>.png`` for each layer into `folder`, which is made if absent.

    Yields:
        each file once it is written.

    Raises:
        ArtifactError: `folder` cannot be made or written, or there is a single expert.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for layer in artifact.layers:
            file = folder / f"layer_{layer}.png"
            draw(artifact, layer, file)
            yield file
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot write heat maps there: {error}; name a folder that can be written"
        ) from None


def draw(artifact: SimilarityArtifact, layer: int, file: Path) -> None:
    """Draw one layer's matrix as a PNG. Needs matplotlib, the extra ``plot``.

    Colours span the values off the diagonal. Where the metric has no lower bound they span those
    above the `CLIPPED` quantile, for a few far experts would use up the scale.

    Raises:
        ArtifactError: there is a single expert.
        OSError: `file` cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    clipped = math.isinf(METRICS[artifact.metric].lowest)
    matrix = artifact.matrices[layer].float()
    low, high = _range(matrix, clipped)
    margins = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=INCHES, layout=margins, dpi=160)
    panel = figure.subplots()
    colours = colormaps[COLOURS].with_extremes(bad=DIAGONAL)
    shown = matrix.clone().fill_diagonal_(torch.nan)  # NaN is how matplotlib masks
    image = panel.imshow(shown.numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    bar = figure.colorbar(image, extend="min" if clipped else "neither", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    note = f"\nclipped below {low:.3g}, the {CLIPPED:.0%} quantile" if clipped else ""
    bar.set_label(f"similarity, larger is closer{note}")
    _label(panel, artifact, layer)
    figure.savefig(file)


def _label(panel: Any, artifact: SimilarityArtifact, layer: int) -> None:
    count = artifact.num_experts
    title = textwrap.fill(f"layer {layer} of {artifact.model or 'an unnamed model'}", TITLE_LETTERS)
    panel.set_title(title, loc="left", fontweight="bold", pad=24, parse_math=False)
    symmetric = METRICS[artifact.metric].symmetric
    rows = "symmetric" if symmetric else "row u: who can stand in for u"
    note = f"{artifact.metric} similarity of {count} experts, {rows}"
    panel.text(0, 1.015, note, transform=panel.transAxes, color="0.35", parse_math=False)
    panel.set(xlabel="expert v, the stand-in", ylabel="expert u, to be replaced")
    step = 2 ** max(0, math.ceil(math.log2(count / TICKS)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(range(0, count, step))
    panel.tick_params(length=3, color="0.6")
    panel.spines[:].set_visible(False)


def _range(matrix: Tensor, clipped: bool) -> tuple[float, float]:
    values = off_diagonal(matrix).flatten().double()
    low = float(values.quantile(CLIPPED)) if clipped else float(values.min())
    high = float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)
