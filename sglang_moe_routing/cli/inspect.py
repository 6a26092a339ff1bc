"""``inspect``: how far a similarity artifact can be trusted, and how two of them agree."""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from ..artifacts import METRICS, SimilarityArtifact, load_artifact
from ..calibration import heatmap
from ..calibration.statistics import TOP, compare, layer_statistics, spans
from ..errors import ArtifactError
from .output import (
    Json,
    check_matplotlib,
    clear_errors,
    console,
    errors,
    fail,
    layer_ids,
    print_json,
    say,
)

FEW = 0.25
"""A smaller share of experts than this that are anybody's nearest is worth a warning."""


def inspect(
    file: Annotated[Path, typer.Argument(help="Similarity artifact (safetensors).")],
    other: Annotated[
        Path | None,
        typer.Option("--compare", metavar="OTHER", help="Artifact to compare the ranks with."),
    ] = None,
    rho: Annotated[
        str, typer.Option(metavar="LIST", help="Thresholds at which to count critical experts.")
    ] = "0,0.25,0.5,0.75,0.9",
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to draw a heat map per layer.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Layers, such as 0-3,7; all by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a similarity artifact holds, how far to trust it, and how two of them agree."""
    rhos = _rhos(rho)
    if plots is not None:
        check_matplotlib("--plots")
    with clear_errors():
        artifact = _load(file, layers)
        found = _describe(file, artifact, rhos)
        found["comparison"] = _compare(artifact, other, layers is not None) if other else None
        if plots is not None:
            _draw(artifact, plots)
    if json:
        print_json(found)
    else:
        _print(found)


def _rhos(text: str) -> list[float]:
    try:
        rhos = [float(part) for part in text.split(",")]
    except ValueError:
        rhos = []
    if not rhos or not all(math.isfinite(rho) for rho in rhos):
        fail(f"--rho {text!r}: expected finite numbers separated by commas, such as 0.25,0.5")
    return list(dict.fromkeys(rhos))


def _load(file: Path, layers: str | None) -> SimilarityArtifact:
    artifact = load_artifact(file)
    if layers is None:
        return artifact
    wanted = layer_ids(layers)
    missing = next((layer for layer in wanted if layer not in artifact.layers), None)
    if missing is not None:
        raise ArtifactError(
            f"--layers {layers!r}: {file} has no layer {missing}; it has {spans(artifact.layers)}"
        )
    return _narrowed(artifact, set(wanted))


def _narrowed(artifact: SimilarityArtifact, layers: set[int]) -> SimilarityArtifact:
    return replace(
        artifact,
        matrices={layer: m for layer, m in artifact.matrices.items() if layer in layers},
        coefficients={layer: m for layer, m in artifact.coefficients.items() if layer in layers},
    )


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name before a complaint about its contents."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from None


def _describe(file: Path, artifact: SimilarityArtifact, rhos: Sequence[float]) -> dict[str, Any]:
    with _naming(file):
        layers = [
            asdict(layer_statistics(layer, matrix, rhos, artifact.coefficients.get(layer)))
            for layer, matrix in sorted(artifact.matrices.items())
        ]
    for layer in layers:
        shares = layer["share_without_neighbour"]
        layer["share_without_neighbour"] = {_number(rho): share for rho, share in shares.items()}
    return {
        "file": str(file),
        "metric": artifact.metric,
        "meaning": METRICS[artifact.metric].meaning,
        "model": artifact.model,
        "num_experts": artifact.num_experts,
        "details": dict(artifact.details),
        "layers": layers,
    }


def _number(rho: float) -> str:
    """All digits of `rho`, and no more."""
    return repr(rho).removesuffix(".0")


def _compare(artifact: SimilarityArtifact, other: Path, narrow: bool) -> dict[str, Any]:
    beside = load_artifact(other)
    common = set(artifact.layers) & set(beside.layers)
    if narrow and common:
        beside = _narrowed(beside, common)
    with _naming(other):
        comparison = compare(artifact, beside)
    about = {"file": str(other), "metric": beside.metric, "model": beside.model}
    return about | asdict(comparison)


def _draw(artifact: SimilarityArtifact, folder: Path) -> None:
    with errors.status("drawing") as status:
        for file in heatmap.draw_all(artifact, folder):
            status.update(f"drawn: {file.name}")
    say(f"heat maps (layers {spans(artifact.layers)}): {folder}", to=errors)


def _print(found: Mapping[str, Any]) -> None:
    console.print(_header(found))
    layers = {layer["layer"]: layer for layer in found["layers"]}
    console.print(_values("similarity", layers))
    if METRICS[found["metric"]].has_coefficients:
        coefficients = {layer: values["coefficients"] for layer, values in layers.items()}
        console.print(_values("coefficient", coefficients))
    console.print(_neighbours(found))
    console.print(_isolated(found))
    _warn_of_hubs(found)
    if found["comparison"] is not None:
        console.print(_agreement(found["comparison"], found["num_experts"]))
        for note in _notes(found, found["comparison"]):
            say(note)


def _header(found: Mapping[str, Any]) -> Table:
    table = Table(Column("what"), Column("found", overflow="fold"), show_header=False)
    table.title = Text(found["file"])
    layers = [layer["layer"] for layer in found["layers"]]
    shown = {key: found[key] for key in ("metric", "meaning", "model")}
    shown |= {"experts": found["num_experts"], "layers": spans(layers)} | found["details"]
    for key, value in shown.items():
        text = value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False)
        table.add_row(Text(key), Text(text))
    return table


def _values(what: str, layers: Mapping[int, Mapping[str, Any]]) -> Table:
    table = Table("layer", "mean", "min", "5%", "median", "95%", "max", "nearest")
    table.title = f"{what} of two different experts"
    table.caption = "nearest: that of an expert's nearest one, mean over experts"
    for layer, values in layers.items():
        numbers = (values["mean"], *values["quantiles"].values(), values["nearest_mean"])
        table.add_row(str(layer), *(f"{number:.3f}" for number in numbers))
    return table


def _neighbours(found: Mapping[str, Any]) -> Table:
    rhos = found["layers"][0]["share_without_neighbour"]
    table = Table("layer", *(f"< {rho}" for rho in rhos), "distinct", "largest hub")
    table.title = "experts whose nearest one is less similar than rho; who is nearest"
    table.caption = (
        "distinct: how many experts are somebody's nearest; "
        "largest hub: the expert that is the nearest of most others (of how many)"
    )
    for layer in found["layers"]:
        shares = (f"{share:.1%}" for share in layer["share_without_neighbour"].values())
        style = "yellow" if _has_hubs(layer, found) else ""
        distinct = Text(f"{layer['distinct_neighbours']} of {found['num_experts']}", style)
        hub = f"{layer['largest_hub']['expert']} ({layer['largest_hub']['count']})"
        table.add_row(str(layer["layer"]), *shares, distinct, hub)
    return table


def _isolated(found: Mapping[str, Any]) -> Table:
    most = max(len(layer["most_isolated"]) for layer in found["layers"])
    table = Table("layer", *("worst", "2nd", "3rd", "4th", "5th")[:most])
    table.title = "most isolated experts: expert→its nearest one, similarity"
    for layer in found["layers"]:
        cells = (
            f"{one['expert']}→{one['nearest']} {one['similarity']:.2f}"
            for one in layer["most_isolated"]
        )
        table.add_row(str(layer["layer"]), *cells)
    return table


def _has_hubs(layer: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return bool(layer["distinct_neighbours"] < FEW * found["num_experts"])


def _warn_of_hubs(found: Mapping[str, Any]) -> None:
    layers = [layer["layer"] for layer in found["layers"] if _has_hubs(layer, found)]
    if layers:
        say(
            f"warning: layers {spans(layers)}: fewer than {FEW:.0%} of the experts are anybody's "
            "nearest. A metric that does not divide by norms mostly finds experts of small norm, "
            "near to all and like none.",
            style="yellow",
        )


def _agreement(comparison: Mapping[str, Any], num_experts: int) -> Table:
    chance, top = comparison["chance"], min(TOP, num_experts - 1)
    table = Table("layer", "same nearest", f"top {top} in common", "rank correlation", "its 5%")
    table.title = Text(f"agreement with {comparison['file']}")
    table.caption = (
        f"chance: {chance:.1%} same nearest, {top * chance:.1%} of top {top}, correlation 0"
    )
    for row in [*comparison["layers"], {"layer": "mean", **comparison["mean"]}]:
        shares = (f"{row[name]:.1%}" for name in ("argmax_agreement", "top5_overlap"))
        ranks = (f"{row[name]:.3f}" for name in ("rank_correlation", "rank_correlation_p05"))
        table.add_row(str(row["layer"]), *shares, *ranks)
    return table


def _notes(found: Mapping[str, Any], comparison: Mapping[str, Any]) -> Iterator[str]:
    for key in ("metric", "model"):
        if found[key] != comparison[key]:
            yield f"note: {key} {found[key]!r} here, {comparison[key]!r} there"
    if found["metric"] != comparison["metric"]:
        yield "note: values of two metrics are not comparable, their ranks are"
    for key, place in (("only_here", found["file"]), ("only_there", comparison["file"])):
        if comparison[key]:
            yield f"note: not compared, only in {place}: layers {spans(comparison[key])}"
