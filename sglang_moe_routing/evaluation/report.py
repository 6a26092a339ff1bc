"""The report of an evaluation: CSV, pictures, and one HTML page that needs no other file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import VANILLA
from .run import SECTIONS

COLUMNS = (
    "section",
    "policy",
    "family",
    "batch_size",
    "cross_entropy",
    "delta",
    "ci_low",
    "ci_high",
    "perplexity",
    "agreement",
    "active_experts",
    "active_experts_base",
    "active_share",
    "tpot_ms",
    "tokens",
)
TEMPLATE = "report.html.j2"
PANEL_INCHES = (5.2, 3.9)
MARKERS = "osD^vPX*"

Row = dict[str, Any]


def rows_of(
    result: Mapping[str, Any],
    families: Mapping[str, str],
    bench: Mapping[str, Any] | None = None,
) -> list[Row]:
    """One flat row per cell.

    Args:
        result: what `Result.as_json` returns.
        families: family of every policy: its kind, and whether it maps weights.
        bench: result of ``bench serve``, whose TPOT is shown beside.
    """
    times = {name: figures.get("tpot_ms") for name, figures in (bench or {}).items()}
    return [
        {
            **{name: found.get(name) for name in COLUMNS},
            "section": section,
            "policy": policy,
            "family": families.get(policy, policy),
            "batch_size": int(batch_size),
            "ci_low": found["ci95"][0],
            "ci_high": found["ci95"][1],
            "tpot_ms": times.get(policy),
            "layers": found["active_experts_per_layer"],
        }
        for section in SECTIONS
        for policy, batch_sizes in result.get(section, {}).items()
        for batch_size, found in batch_sizes.items()
    ]


def write_report(
    result: Mapping[str, Any],
    families: Mapping[str, str],
    folder: Path,
    bench: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write results.csv, the pictures and report.html; the files written."""
    rows = rows_of(result, families, bench)
    pictures = {"pareto": draw_pareto(rows), "layers": draw_layers(rows)}
    if any(row["tpot_ms"] is not None for row in rows):
        pictures["tpot"] = draw_tpot(rows)
    files = [folder / "results.csv"]
    write_csv(rows, files[0])
    for name, figure in pictures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    files.append(folder / "report.html")
    svg = {name: _svg(figure) for name, figure in pictures.items()}
    files[-1].write_text(render(result, rows, svg), encoding="utf-8")
    return files


def write_csv(rows: Sequence[Row], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def render(result: Mapping[str, Any], rows: Sequence[Row], pictures: Mapping[str, str]) -> str:
    """The HTML page. Text is escaped; pictures are SVG of our own making."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sglang_moe_routing.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
    )
    sections = {name: [row for row in rows if row["section"] == name] for name in SECTIONS}
    return environment.get_template(TEMPLATE).render(
        result=result,
        sections={name: found for name, found in sections.items() if found},
        pictures=pictures,
        facts=dict(_facts(result)),
    )


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured on what, as lines of text."""
    machine = result["machine"]
    everything = {**result["settings"], **machine, **machine["versions"]}
    for key, value in everything.items():
        if key != "versions" and value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield key.replace("_", " "), text


def _curves(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by family, each by falling T."""
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        yield family, sorted(own, key=lambda row: -row["active_experts"])


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(2, count)
    lines = -(-count // columns)
    figure = Figure(
        figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def draw_pareto(rows: Sequence[Row]) -> Any:
    """Cross-entropy difference against T, a panel per batch size, a curve per family."""
    main = [row for row in rows if row["section"] == "policies"]
    sizes = list(dict.fromkeys(row["batch_size"] for row in main))
    figure, panels = _panels(len(sizes))
    for panel, size in zip(panels, sizes, strict=True):
        own = [row for row in main if row["batch_size"] == size]
        _draw_curves(panel, own, "active_experts")
        panel.set(
            title=f"batches of {size}",
            xlabel="active experts T (mean of layers and steps)",
            ylabel="cross-entropy over vanilla, nats/token",
        )
    return figure


def _draw_curves(panel: Any, rows: Sequence[Row], x: str) -> None:
    for number, (family, own) in enumerate(_curves(rows)):
        below = [row["delta"] - row["ci_low"] for row in own]
        above = [row["ci_high"] - row["delta"] for row in own]
        panel.errorbar(
            [row[x] for row in own],
            [row["delta"] for row in own],
            yerr=[below, above],
            fmt=MARKERS[number % len(MARKERS)] + "-",
            label=family,
            markersize=4,
            linewidth=0.9,
            capsize=2,
        )
    panel.axhline(0, color="black", linewidth=0.6)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def draw_layers(rows: Sequence[Row]) -> Any:
    """T of every MoE layer under every policy, at the largest batch size."""
    main = [row for row in rows if row["section"] == "policies"]
    size = max(row["batch_size"] for row in main)
    figure, (panel,) = _panels(1)
    figure.set_size_inches(PANEL_INCHES[0] * 1.6, PANEL_INCHES[1])
    for row in main:
        if row["batch_size"] == size:
            style = "k-" if row["policy"] == VANILLA else ".-"
            panel.plot(row["layers"], style, label=row["policy"], linewidth=0.9)
    panel.set(title=f"batches of {size}", xlabel="MoE layer", ylabel="active experts T", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small", ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_tpot(rows: Sequence[Row]) -> Any:
    """Cross-entropy difference against TPOT, at the batch size of the evaluation's largest."""
    timed = [row for row in rows if row["section"] == "policies" and row["tpot_ms"] is not None]
    size = max(row["batch_size"] for row in timed)
    figure, (panel,) = _panels(1)
    _draw_curves(panel, [row for row in timed if row["batch_size"] == size], "tpot_ms")
    panel.set(
        title=f"quality of batches of {size}, time of bench serve",
        xlabel="median TPOT, ms",
        ylabel="cross-entropy over vanilla, nats/token",
    )
    return figure


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    text = stream.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration
