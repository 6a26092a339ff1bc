"""The picture of `bench layer`: time against T, one panel per shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = 2
PANEL_INCHES = (5.6, 4.2)
MARKERS = "osD^vPX*"


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """Draw medians with their quartiles, the fits, and the streaming-read limit.

    Args:
        summary: what `layer.summary` returns.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    shapes = list(summary["fit"])
    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(
        figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines), layout="constrained", dpi=150
    )
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, shape in zip(panels, shapes, strict=False):
        _draw_shape(panel, shape, summary)
    for panel in panels[len(shapes) :]:
        panel.remove()
    figure.savefig(file)


def _draw_shape(panel: Any, shape: str, summary: Mapping[str, Any]) -> None:
    cases = [case for case in summary["cases"] if case["shape"] == shape]
    for number, (impl, fit) in enumerate(summary["fit"][shape].items()):
        points = [case for case in cases if case["impl"] == impl]
        counts = [case["active_experts"] for case in points]
        medians = [case["median_ms"] for case in points]
        below = [case["median_ms"] - case["q1_ms"] for case in points]
        above = [case["q3_ms"] - case["median_ms"] for case in points]
        style: dict[str, Any] = {"color": f"C{number}", "markersize": 4, "capsize": 2}
        marker = MARKERS[number % len(MARKERS)]
        panel.errorbar(
            counts, medians, yerr=[below, above], fmt=marker, label=points[0]["impl"], **style
        )
        if fit is not None:
            line = [fit["fixed_ms"] + fit["per_expert_ms"] * count for count in counts]
            panel.plot(counts, line, color=f"C{number}", linewidth=0.8)
    most = max(case["active_experts"] for case in cases)
    stream = summary["shape_stream_gb_s"][shape]
    limit_ms = most * summary["expert_bytes"][shape] / stream / 1e6
    label = f"weights at {stream} GB/s"
    panel.plot([0, most], [0, limit_ms], "k--", linewidth=1, label=label)
    panel.set(title=shape, xlabel="active experts T", ylabel="ms per layer", xlim=0, ylim=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
