"""``calibrate``: compute the expert-similarity artifact of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..artifacts import load_artifact
from ..errors import CalibrationError
from .output import Json, clear_errors, console, errors, layer_ids, print_json, say

if TYPE_CHECKING:
    from ..calibration.calibrate import Calibration

Metric = Literal[
    "frobenius", "cosine", "cka", "routed", "joint", "least_squares", "weights", "router"
]


def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a name in the local cache.")],
    out: Annotated[Path, typer.Option(help="Artifact to write (safetensors).")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text, JSONL or Parquet file, or data set NAME:CONFIG@SPLIT; repeat for more.",
        ),
    ] = None,
    metric: Annotated[Metric, typer.Option(help="Measure of how alike experts are.")] = "routed",
    num_sequences: Annotated[int, typer.Option(min=1, help="Number of sequences of text.")] = 400,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of sequences.")] = 0,
    text_column: Annotated[str, typer.Option(help="Column of a table that holds text.")] = "text",
    name: Annotated[
        str | None, typer.Option(help="The model's name in the artifact; MODEL's if absent.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="MoE layers, such as 0-3,7; all by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:1.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type to compute in; auto is the checkpoint's."),
    ] = "auto",
    stored_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Type of the matrices in the artifact.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward.")] = 8,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run has finished.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that is there already.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings.")
    ] = False,
    json: Json = False,
) -> None:
    """Compute a model's similarity artifact, layer by layer; go on where it was interrupted."""
    with clear_errors():
        _check_out(out, overwrite)
        wanted = None if layers is None else layer_ids(layers)
        from ..calibration.calibrate import Calibration  # imports transformers
        from ..calibration.metrics import METRICS as COMPUTED
        from ..calibration.streaming import StreamedModel
        from ..text import load_tokenizer, read_text

        needs_text = COMPUTED[metric].needs_tokens
        if needs_text and not data:
            raise CalibrationError(f"--metric {metric} needs calibration text: add --data")
        if data and not needs_text:
            raise CalibrationError(f"--metric {metric} uses no text: leave out --data")
        streamed = StreamedModel(
            model, dtype=dtype, device=_device(device), trust_remote_code=trust_remote_code
        )
        text = None
        if data:
            text = read_text(
                data,
                load_tokenizer(streamed.folder, trust_remote_code),
                num_sequences=num_sequences,
                sequence_length=seq_len,
                seed=seed,
                column=text_column,
            )
        import torch

        run = Calibration(
            streamed,
            name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
            metric=metric,
            out=out,
            text=text,
            layers=wanted,
            batch_size=batch_size,
            dtype=getattr(torch, stored_dtype),
        )
        with _progress(run) as report:
            run.run(report, restart=restart)
        summary = _summary(run, out)
    if json:
        print_json(summary)
    else:
        _print(summary)


def _check_out(out: Path, overwrite: bool) -> None:
    """Before hours of work rather than after them."""
    if out.is_dir():
        raise CalibrationError(
            f"--out {out}: a folder; name a file, such as {out}/similarity.safetensors"
        )
    if out.exists() and not overwrite:
        raise CalibrationError(f"--out {out}: is there already; add --overwrite to replace it")
    if (out.parent / "config.json").exists():
        raise CalibrationError(
            f"--out {out}: {out.parent} is a model folder, of which SGLang loads every safetensors "
            "file as weights; write the artifact elsewhere"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CalibrationError(f"--out {out}: cannot be written: {error.strerror}") from None


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CalibrationError(f"--device {name}: cannot be used: {reason}") from None
    return name


@contextmanager
def _progress(run: Calibration) -> Iterator[Any]:
    columns = (
        TextColumn("layer {task.fields[layer]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("", total=run.num_steps, layer="-")
        finished: dict[int, int] = {}

        def report(layer: int, done: int, total: int) -> None:
            finished[layer] = done
            progress.update(task, completed=sum(finished.values()), layer=layer)

        yield report


def _summary(run: Calibration, out: Path) -> dict[str, Any]:
    artifact = load_artifact(out)
    return {
        "file": str(out),
        "metric": artifact.metric,
        "model": artifact.model,
        "num_experts": artifact.num_experts,
        "layers": artifact.layers,
        "resumed_layers": run.resumed,
        "details": dict(artifact.details),
        "seconds": {
            str(layer): {part: round(seconds, 3) for part, seconds in asdict(timings).items()}
            for layer, timings in run.timings.items()
        },
    }


def _print(summary: dict[str, Any]) -> None:
    table = Table("layer", "read weights", "run layer", "experts and sums", title="seconds")
    for layer, seconds in summary["seconds"].items():
        table.add_row(layer, *(f"{number:.1f}" for number in seconds.values()))
    console.print(table)
    resumed = summary["resumed_layers"]
    if resumed:
        console.print(f"found finished: layers {resumed}")
    for layer, notes in summary["details"].get("layers", {}).items():
        if unused := notes.get("experts_without_tokens"):
            console.print(f"layer {layer}: no token came to experts {unused}", style="yellow")
    say(
        f"{summary['file']}: {summary['metric']}, {len(summary['layers'])} layers of "
        f"{summary['num_experts']} experts"
    )
