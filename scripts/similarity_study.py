"""Measure what SERE costs in quality with given similarity files, next to OEA and a random matrix.

    python scripts/similarity_study.py MODEL --data a.txt b.txt \\
        --similarity frobenius=f.safetensors routed=r.safetensors --num-primary 1 2 3

Teacher-forced, in float32: step t of a group of sequences is the batch made of their t-th tokens.
The first positions of a window are prefill and vanilla; from there on every layer routes under the
policy and cross-entropy counts. Routing at step t needs nothing after t, so this equals a decode
token by token. Differences to vanilla are paired by window. OEA with k0 = num_primary and SERE
over a random matrix load about as many experts as SERE with any other matrix. Serves transformers
models whose MoE blocks pick by the softmax of logits that a module named gate or router returns.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sglang_moe_routing.artifacts import SimilarityArtifact, load_artifact
from sglang_moe_routing.errors import ArtifactError, PolicyError
from sglang_moe_routing.policies import (
    OEA,
    SERE,
    FreeSlots,
    Policy,
    PolicyTable,
    Router,
    Vanilla,
    build_table,
    reroute,
)

OFF = "off"
RANDOM = "random"
LOWEST = -torch.finfo(torch.float32).max  # a policy's threshold is finite

Matrices = Mapping[int, Tensor]  # by layer id


class StudyError(Exception):
    """The model, the data or a similarity file does not suit the study."""


@dataclass(frozen=True)
class Protocol:
    """What is measured on.

    Attributes:
        group: sequences whose tokens share a step.
        prefill: positions at the start of a window that stay vanilla and do not count.
        length: positions of a window, whose last one predicts one token more.
        windows_per_file: windows drawn from each file, without overlap.
        same_domain: whether a group takes its windows from one file.
        seed: of the windows and their grouping.
        random_seeds: random matrices whose mean is the control.
    """

    group: int = 16
    prefill: int = 64
    length: int = 160
    windows_per_file: int = 32
    same_domain: bool = False
    seed: int = 0
    random_seeds: int = 3


@dataclass(frozen=True)
class Case:
    """One line of the outcome: a policy, over the mean of `choices` of similarity matrices."""

    policy: Policy
    choices: Sequence[Matrices] = ({},)
    similarity: str | None = None
    num_primary: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a case did.

    Attributes:
        losses: float64 ``[num_windows]``, mean cross-entropy of each window in nats per token.
        active: mean distinct experts per step and layer (T).
    """

    losses: Tensor
    active: float


class MoELayer:
    """Routes one MoE block of a model.

    Attributes:
        layer: its layer id.
        table: the policy in force.
        active: int64 scalars, the distinct experts of each step.
    """

    def __init__(self, layer: int, gate: nn.Module, experts: nn.Module, protocol: Protocol):
        self.layer = layer
        self.num_experts = 0  # these two are known after the first call
        self.top_k = 0
        self.table: PolicyTable | None = None
        self.active: list[Tensor] = []
        self._protocol = protocol
        self._logits: Any = None
        gate.register_forward_hook(self._keep_logits)
        experts.register_forward_pre_hook(self._route)

    def follow(self, policy: Policy, matrix: Tensor | None) -> None:
        """Put `policy` in force, with `matrix` ``[num_experts, num_experts]`` if it needs one."""
        self.active = []
        self.table = build_table(
            [policy],
            layer=self.layer,
            top_k=self.top_k,
            num_experts=self.num_experts,
            similarity={} if matrix is None else {"": matrix},
            artifacts=[None if matrix is None else ""],
        )

    def _keep_logits(self, gate: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output[0] if isinstance(output, tuple) else output

    def _route(self, experts: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Change the arguments of the experts: hidden states, top-k ids, top-k weights."""
        router = softmax_router(self._logits, *args[1:])
        if router is None:
            raise StudyError(f"layer {self.layer} does not route by the softmax of its logits")
        self.num_experts, self.top_k = self._logits.shape[1], args[1].shape[1]
        if self.table is None:
            return args
        hidden, ids, weights = args
        by_sequence = (self._protocol.group, self._protocol.length)
        scores, gates = (x.unflatten(0, by_sequence) for x in router.score(self._logits))
        ids, weights = (x.clone().unflatten(0, by_sequence) for x in (ids, weights))
        policy_ids = torch.zeros(self._protocol.group, dtype=torch.int64)
        for step in range(self._protocol.prefill, self._protocol.length):
            call = (x[:, step] for x in (scores, gates, ids, weights))
            routed = reroute(
                *call,
                policy_ids,
                self.table,
                renormalize=router.renormalize,
                free_slots=FreeSlots.REPEAT_FIRST,  # the model's own code takes no id below 0
            )
            ids[:, step], weights[:, step] = routed.topk_ids, routed.topk_weights
            self.active.append(routed.active)
        return hidden, ids.flatten(0, 1), weights.flatten(0, 1)


def softmax_router(logits: Any, *choice: Any) -> Router | None:
    """The router that explains a `choice` of top-k ids and weights, if it is one over softmax.

    Args:
        logits: ``[num_tokens, num_experts]``.
        choice: ``[num_tokens, top_k]`` ids and weights.
    """
    if not isinstance(logits, Tensor) or len(choice) != 2 or logits.ndim != 2:
        return None
    ids, weights = choice
    if len(logits) != len(ids) or logits.shape[1] <= int(ids.max()):
        return None
    gates = logits.float().softmax(dim=1)
    picked = gates.gather(1, ids)
    best = gates.topk(ids.shape[1], dim=1).values
    if not torch.allclose(picked.sort(dim=1, descending=True).values, best):
        return None
    for renormalize in (True, False):
        expected = picked / picked.sum(dim=1, keepdim=True) if renormalize else picked
        if torch.allclose(weights.float(), expected, atol=1e-6):
            return Router(renormalize=renormalize)
    return None


class Study:
    """A model, the windows to measure it on, and what was measured."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, protocol: Protocol):
        self.model = model
        self.windows = windows
        self.protocol = protocol
        self.layers = find_layers(model, protocol)
        with torch.no_grad():  # the layers learn their sizes
            model(input_ids=windows[:1, :1], use_cache=False)

    def measure(self, case: Case) -> Measured:
        """The mean over the choices of the case."""
        runs = [self._run(case.policy, choice) for choice in case.choices]
        losses = torch.stack([run.losses for run in runs]).mean(dim=0)
        return Measured(losses, sum(run.active for run in runs) / len(runs))

    def _run(self, policy: Policy, choice: Matrices) -> Measured:
        for layer in self.layers:
            layer.follow(policy, choice.get(layer.layer))
        with torch.no_grad():
            groups = self.windows.split(self.protocol.group)
            losses = torch.cat([self._losses(group) for group in groups])
        active = torch.stack([steps for layer in self.layers for steps in layer.active])
        return Measured(losses, float(active.double().mean()))

    def _losses(self, windows: Tensor) -> Tensor:
        """float64 ``[group]``, of token ids ``[group, length + 1]``."""
        counted = self.protocol.length - self.protocol.prefill
        inputs, targets = windows[:, :-1], windows[:, -counted:]
        output = self.model(input_ids=inputs, use_cache=False, logits_to_keep=counted)
        losses = nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        return losses.view_as(targets).double().mean(dim=1)


def find_layers(model: nn.Module, protocol: Protocol) -> list[MoELayer]:
    """Hook every block that has experts and a gate or router."""
    found = []
    for name, block in model.named_modules():
        parts = dict(block.named_children())
        gate = parts.get("gate", parts.get("router"))
        number = re.search(r"\blayers\.(\d+)\b", name)
        if number and gate is not None and "experts" in parts:
            found.append(MoELayer(int(number[1]), gate, parts["experts"], protocol))
    if not found:
        raise StudyError("the model has no block with experts and a gate or router")
    return found


def read_windows(tokenizer: Any, files: Sequence[Path], protocol: Protocol) -> Tensor:
    """Draw windows and order them by group.

    Returns:
        int64 ``[num_windows, length + 1]`` token ids; each `group` in a row share their steps.
    """
    generator = torch.Generator().manual_seed(protocol.seed)
    drawn = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        size = protocol.length + 1
        windows = ids[: len(ids) // size * size].view(-1, size)
        if len(windows) < protocol.windows_per_file:
            raise StudyError(f"{file} holds {len(windows)} windows of {size} tokens")
        picked = torch.randperm(len(windows), generator=generator)[: protocol.windows_per_file]
        drawn.append(windows[picked])
    grouped = protocol.windows_per_file if protocol.same_domain else len(torch.cat(drawn))
    if grouped % protocol.group:
        raise StudyError(f"{grouped} windows do not make groups of {protocol.group}")
    windows = torch.cat(drawn)
    if protocol.same_domain:
        return windows
    return windows[torch.randperm(len(windows), generator=generator)]


def random_matrices(layers: Sequence[MoELayer], seed: int) -> Matrices:
    """Symmetric, uniform in [0, 1), 1 on the diagonal: float32 ``[num_experts, num_experts]``."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for layer in layers:
        upper = torch.rand(layer.num_experts, layer.num_experts, generator=generator).triu(1)
        matrices[layer.layer] = upper + upper.T + torch.eye(layer.num_experts)
    return matrices


def check_artifact(artifact: SimilarityArtifact, name: str, layers: Sequence[MoELayer]) -> None:
    for layer in layers:
        if layer.layer not in artifact.matrices:
            raise StudyError(f"{name} has no matrix for layer {layer.layer}")
        if artifact.num_experts != layer.num_experts:
            raise StudyError(
                f"{name} is for {artifact.num_experts} experts, the model has {layer.num_experts}"
            )


def make_cases(
    study: Study,
    artifacts: Mapping[str, SimilarityArtifact],
    num_primary: Sequence[int],
    thresholds: Sequence[float],
) -> Iterator[Case]:
    """OEA, SERE over every artifact and threshold, SERE over random matrices re-routing always."""
    for s in num_primary:
        yield Case(OEA.model_validate({"k0": s}), num_primary=s)
    named = [(name, [a.matrices], rho) for name, a in artifacts.items() for rho in thresholds]
    controls = [random_matrices(study.layers, seed) for seed in range(study.protocol.random_seeds)]
    if controls:
        named.append((RANDOM, controls, -math.inf))
    for name, choices, rho in named:
        for s in num_primary:
            policy = SERE.model_validate({"num_primary": s, "threshold": max(rho, LOWEST)})
            yield Case(policy, choices, name, s, rho)


def row_of(case: Case, measured: Measured, vanilla: Measured) -> dict[str, Any]:
    """A line of the outcome; `threshold` is "off" where nothing is too dissimilar."""
    difference = measured.losses - vanilla.losses
    return {
        "method": case.policy.kind,
        "similarity": case.similarity,
        "num_primary": case.num_primary,
        "threshold": OFF if case.threshold == -math.inf else case.threshold,
        "cross_entropy": round(float(measured.losses.mean()), 5),
        "delta": round(float(difference.mean()), 5),
        "se": round(float(difference.std()) / math.sqrt(len(difference)), 5),
        "active_experts": round(measured.active, 3),
    }


def run_study(
    study: Study,
    artifacts: Mapping[str, SimilarityArtifact],
    num_primary: Sequence[int],
    thresholds: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """Measure every case against vanilla; rows as they are done."""
    for name, artifact in artifacts.items():
        check_artifact(artifact, name, study.layers)
    case = Case(Vanilla())
    vanilla = study.measure(case)
    yield row_of(case, vanilla, vanilla)
    for case in make_cases(study, artifacts, num_primary, thresholds):
        yield row_of(case, study.measure(case), vanilla)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("method", "similarity", "S / k0", "threshold", box=None, header_style="bold")
    for head in ("cross-entropy", "delta", "± se", "active experts"):
        table.add_column(head, justify="right")
    for row in rows:
        names = [row[key] for key in ("method", "similarity", "num_primary", "threshold")]
        figures = f"{row['cross_entropy']:.4f} {row['delta']:+.4f} {row['se']:.4f}".split()
        cells = ["" if name is None else str(name) for name in names]
        table.add_row(*cells, *figures, f"{row['active_experts']:.2f}")
    Console(width=100).print(table)


def parse_threshold(text: str) -> float:
    value = -math.inf if text == OFF else float(text)
    if math.isnan(value) or value == math.inf:
        raise ValueError
    return value


def parse_named_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file) or name == RANDOM:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, with a name other than {RANDOM}")
    return name, Path(file)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--similarity",
        type=parse_named_file,
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="similarity files and what to call them",
    )
    parser.add_argument("--num-primary", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--threshold",
        type=parse_threshold,
        nargs="+",
        default=[-math.inf],
        help="similarities below which a slot keeps its expert; -inf or off: it never does so",
    )
    parser.add_argument("--same-domain", action="store_true", help="group windows by file")
    parser.add_argument("--random-seeds", type=int, default=3, help="0: no random control")
    parser.add_argument("--windows-per-file", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT")
    # argparse takes -inf for an option
    return parser.parse_args([OFF if text == "-inf" else text for text in arguments])


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    protocol = Protocol(
        windows_per_file=args.windows_per_file,
        same_domain=args.same_domain,
        seed=args.seed,
        random_seeds=args.random_seeds,
    )
    try:
        artifacts = {name: load_artifact(file) for name, file in args.similarity}
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        windows = read_windows(tokenizer, args.data, protocol)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        study = Study(model, windows, protocol)
        rows = list(run_study(study, artifacts, args.num_primary, args.threshold))
    except (StudyError, ArtifactError, PolicyError, OSError) as error:
        sys.exit(f"similarity_study: {error}")
    print_rows(rows)
    if args.json:
        used = {n: {"metric": a.metric, "sha256": a.sha256} for n, a in artifacts.items()}
        outcome = {
            "model": args.model.resolve().name,
            "data": [file.name for file in args.data],
            "protocol": {**asdict(protocol), "windows": len(windows), "similarity": used},
            "rows": rows,
        }
        args.json.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
