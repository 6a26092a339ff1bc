"""Compute the similarity artifact of a model; an interruption costs one layer at most.

Beside the artifact-to-be lies a folder with what is finished: a matrix per layer, and the hidden
states that the next layer starts from. It goes away when the artifact is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..artifacts import SimilarityArtifact, save_artifact
from ..errors import CalibrationError
from ..text import TokenizedText
from .experts import Experts, Routing
from .metrics import METRICS, Metric
from .streaming import StreamedModel

Report = Callable[[int, int, int], None]
"""Called with (layer, batches done, batches in all)."""

_STATE, _HIDDEN, _MATRIX = "run.json", "hidden-{}.safetensors", "layer-{}.safetensors"
_PACKAGES = ("torch", "transformers")
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUGH_TOLERANCE = 0.05  # 16-bit outputs, added up in another order


@dataclass
class Timings:
    """Seconds of one layer: reading its weights, running it, and summing up over its experts."""

    load: float = 0.0
    forward: float = 0.0
    similarity: float = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)


@dataclass
class Calibration:
    """One run: its settings, and where it writes.

    Attributes:
        model: to calibrate.
        name: of the model, for people.
        metric: one of `metrics.METRICS`.
        out: the artifact.
        text: calibration text; None for a metric that needs none.
        layers: MoE layers to make matrices for; all if None.
        batch_size: sequences in one forward.
        dtype: of the matrices, float32 or float16.
        timings: of the layers that this process has finished.
        resumed: layers that were found finished.
    """

    model: StreamedModel
    name: str
    metric: str
    out: Path
    text: TokenizedText | None = None
    layers: Collection[int] | None = None
    batch_size: int = 8
    dtype: torch.dtype = torch.float32
    timings: dict[int, Timings] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = list(self.model.moe_layers)
        self._wanted = known if self.layers is None else sorted(self.layers)
        unknown = sorted(set(self._wanted) - set(known))
        if unknown:
            raise CalibrationError(
                f"layer {unknown[0]} of {self.name} has no routed experts; MoE layers: {known}"
            )
        self._folder = self.out.with_name(f"{self.out.name}.partial")
        self._fingerprint = self.model.fingerprint()

    @property
    def num_steps(self) -> int:
        """Batches of all layers that a run from the beginning goes through."""
        return len(self._steps()) * self._num_batches

    def run(self, report: Report = lambda layer, done, total: None, restart: bool = False) -> None:
        """Compute what is not finished yet and write the artifact.

        Args:
            restart: forget what an earlier run has finished.

        Raises:
            CalibrationError: the folder of partial results belongs to a run with other settings;
                the model's experts do not add up to what the model computes; a weight is NaN.
            ArtifactError: a matrix is not a similarity (a bug of ours).
        """
        self._prepare_folder(restart)
        done = self._resume()
        states = self._first_states(done)
        for step in self._steps():
            if step in done:
                report(step, self._num_batches, self._num_batches)
                continue
            self._run_layer(step, states, report)
            self._keep(step, states)
        save_artifact(self._artifact(), self.out)
        shutil.rmtree(self._folder)

    # --- one layer -----------------------------------------------------------------------------

    def _steps(self) -> list[int]:
        """Layers to run: up to the last wanted one, or the wanted ones where no text is needed."""
        return self._wanted if self.text is None else list(range(max(self._wanted) + 1))

    @property
    def _num_batches(self) -> int:
        return 1 if self.text is None else -(-len(self.text.token_ids) // self.batch_size)

    @torch.no_grad()
    def _run_layer(self, layer: int, states: list[Tensor], report: Report) -> None:
        """Replace the hidden states before the layer by those after it; write its matrix."""
        timings = self.timings.setdefault(layer, Timings())
        started = time.perf_counter()
        with self.model.loaded(layer):
            timings.load = time.perf_counter() - started
            metric = self._metric(layer)
            report(layer, 0, self._num_batches)
            for batch, state in enumerate(states):
                states[batch] = self._run_batch(layer, state, metric, timings, is_first=batch == 0)
                report(layer, batch + 1, self._num_batches)
            if metric is not None:
                with timings.measure("similarity"):
                    self._write_matrix(layer, metric)
            report(layer, self._num_batches, self._num_batches)

    def _metric(self, layer: int) -> Metric | None:
        if layer not in self._wanted:
            return None
        num_tokens = 0 if self.text is None else self.text.token_ids.numel()
        experts = self.model.moe_layers[layer]
        return METRICS[self.metric](experts, self.model.hidden_size, num_tokens)

    def _run_batch(
        self, layer: int, state: Tensor, metric: Metric | None, timings: Timings, is_first: bool
    ) -> Tensor:
        if metric is None:
            with timings.measure("forward"):
                return self.model.run_layer(layer, state)
        with timings.measure("forward"), metric.experts.watch() as seen:
            output = self.model.run_layer(layer, state)
        if len(seen) != 1:
            raise CalibrationError(f"{metric.experts.name} ran {len(seen)} times in one forward")
        if is_first:
            check_experts(metric.experts, seen[0])
        with timings.measure("similarity"):
            metric.update(seen[0])
        return output

    def _write_matrix(self, layer: int, metric: Metric) -> None:
        matrix, coefficients = metric.matrix(), metric.coefficients()
        if not bool(torch.isfinite(matrix).all()):
            damaged = metric.experts.damaged()
            cause = (
                f"{damaged or 'not a parameter, but what it is given'} has NaN or infinite values"
            )
            raise CalibrationError(f"{self.name}: layer {layer} has no similarity: {cause}")
        notes = {"notes": json.dumps(metric.notes())}
        tensors = {"similarity": matrix.to(self.dtype)}
        if coefficients is not None:
            tensors["coefficient"] = coefficients.to(self.dtype)
        _write(tensors, self._matrix_file(layer), notes)

    # --- partial results -----------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What must be equal for two runs to be parts of one."""
        return {
            "metric": self.metric,
            "model": asdict(self._fingerprint),
            "text": None if self.text is None else self.text.sha256,
            "batch_size": self.batch_size,
            "compute_dtype": str(self.model.dtype),
            "layers": self._wanted,
            "dtype": str(self.dtype),
            "versions": {"sglang-moe-routing": __version__}
            | {name: metadata.version(name) for name in _PACKAGES},
        }

    def _prepare_folder(self, restart: bool) -> None:
        """Make the folder of partial results, or find it; never delete what is not ours."""
        is_ours = (self._folder / _STATE).is_file()
        if is_ours and restart:
            shutil.rmtree(self._folder)
        elif not is_ours and self._folder.exists() and any(self._folder.iterdir()):
            raise CalibrationError(
                f"{self._folder} is there, but holds no interrupted run; move it or choose another "
                "--out"
            )
        if restart or not is_ours:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_state(None)

    def _resume(self) -> Collection[int]:
        """Layers that are finished."""
        with self._naming_damage():
            found = json.loads((self._folder / _STATE).read_text())
        mine = self._settings()
        differing = [key for key in mine if found["settings"].get(key) != mine[key]]
        if differing:
            raise CalibrationError(
                f"{self._folder} is of an interrupted run with another {', '.join(differing)}; "
                "repeat that run's settings to go on, or start over with --restart"
            )
        last = found["last"]
        done = [] if last is None else [step for step in self._steps() if step <= last]
        self.resumed = [layer for layer in done if layer in self._wanted]
        return done

    def _first_states(self, done: Collection[int]) -> list[Tensor]:
        """Hidden states before the first layer to run, batch by batch."""
        if self.text is None:
            return []
        if done:
            with self._naming_damage():
                stored = load_file(self._hidden_file(max(done)))
            return [stored[name] for name in sorted(stored)]
        return list(self.model.embed(self.text.token_ids.split(self.batch_size)))

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            raise CalibrationError(f"{self._folder}: damaged, add --restart: {error}") from None

    def _keep(self, layer: int, states: list[Tensor]) -> None:
        """Everything up to `layer` is finished: say so after its files are there."""
        if states:
            batches = {f"batch-{i:06}": state for i, state in enumerate(states)}
            _write(batches, self._hidden_file(layer), {})
        self._write_state(layer)
        for file in self._folder.glob(_HIDDEN.format("*")):
            if file != self._hidden_file(layer):
                file.unlink()

    def _write_state(self, last: int | None) -> None:
        state = json.dumps({"settings": self._settings(), "last": last})
        with _unfinished(self._folder / _STATE) as file:
            file.write_text(state)

    def _hidden_file(self, layer: int) -> Path:
        return self._folder / _HIDDEN.format(layer)

    def _matrix_file(self, layer: int) -> Path:
        return self._folder / _MATRIX.format(layer)

    # --- the artifact --------------------------------------------------------------------------

    def _artifact(self) -> SimilarityArtifact:
        matrices, coefficients, notes = {}, {}, {}
        for layer in self._wanted:
            with self._naming_damage():
                tensors, note = _read_matrix(self._matrix_file(layer))
            matrices[layer] = tensors["similarity"]
            if "coefficient" in tensors:
                coefficients[layer] = tensors["coefficient"]
            if note:
                notes[str(layer)] = note
        return SimilarityArtifact(
            matrices=matrices,
            metric=self.metric,
            model=self.name,
            details=self._details(notes),
            fingerprint=self._fingerprint,
            coefficients=coefficients,
        )

    def _details(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        details: dict[str, Any] = {
            "architecture": self.model.architecture,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "compute_dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": self._settings()["versions"],
        }
        if self.text is not None:
            num_sequences, length = self.text.token_ids.shape
            details["text"] = {
                "sources": [os.path.basename(source) for source in self.text.sources],
                "sequences": num_sequences,
                "sequence_length": length,
                "tokens": num_sequences * length,
                "seed": self.text.seed,
                "sha256": self.text.sha256,
            }
        if notes:
            details["layers"] = notes
        return details


def check_experts(experts: Experts, routing: Routing, num_tokens: int = 32) -> None:
    """Hold the experts, run one by one, to what the model makes of them together.

    Raises:
        CalibrationError: a token's experts, each times its weight, do not add up to the output.
    """
    hidden, ids = routing.hidden[:num_tokens], routing.topk_ids[:num_tokens]
    expected = routing.combined[:num_tokens].float()
    added = torch.zeros_like(expected)
    for expert in ids.unique().tolist():
        weight = (routing.topk_weights[:num_tokens] * (ids == expert)).sum(dim=1, keepdim=True)
        added += weight.float() * experts.run(expert, hidden).float()
    off = float((added - expected).norm() / expected.norm().clamp_min(1e-30))
    if off > _TOLERANCE.get(hidden.dtype, _ROUGH_TOLERANCE):  # NaN goes on: a weight is named later
        raise CalibrationError(
            f"{experts.name}: its experts times their weights differ from its output by {off:.2g}; "
            f"{type(experts.module).__name__} does not combine its experts in a known way"
        )


def _read_matrix(file: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(stored.metadata()["notes"])


def _write(tensors: dict[str, Tensor], file: Path, notes: dict[str, str]) -> None:
    with _unfinished(file) as unfinished:
        save_file(tensors, str(unfinished), notes)


@contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """Where to write a file that is whole as soon as it has its name.

    Raises:
        CalibrationError: it cannot be written; nothing of it is left behind.
    """
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        yield unfinished
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise CalibrationError(
            f"{file}: cannot be written: {error}; what was finished before is kept: make room, "
            "then run the same command again"
        ) from None
