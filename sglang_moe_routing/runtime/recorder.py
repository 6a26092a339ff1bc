"""A debug recorder of MoE calls, off by default. It synchronises the device on every call."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .. import environment
from ..artifacts import SimilarityArtifact
from ..policies import PAD, Place, TorchPolicy
from .definitions import Definition
from .plan import Layer, Plan


class Recorder:
    """Appends every MoE call under a plan to ``calls-<pid>.jsonl``, one JSON object a line.

    It records while its folder exists, so that a test can choose what to record. Numbers are
    exact: float32 survives the round trip through JSON. `testing.read_records` reads it.
    """

    def __init__(
        self, folder: Path, definitions: Sequence[Definition], layers: Sequence[Layer]
    ) -> None:
        self._path = folder / f"calls-{os.getpid()}.jsonl"
        self._definitions = definitions
        self._layers = layers
        self._written: set[tuple[str, int]] = set()

    @property
    def is_on(self) -> bool:
        return self._path.parent.is_dir()

    @classmethod
    def from_environment(
        cls, definitions: Sequence[Definition], layers: Sequence[Layer]
    ) -> Self | None:
        """Args: definitions: by policy id; read anew at every call."""
        folder = os.environ.get(environment.RECORD)
        return cls(Path(folder), definitions, layers) if folder else None

    def record(
        self,
        layer: Layer,
        plan: Plan | None,
        policy_ids: Tensor,
        router_logits: Tensor,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write down one call. A call without live rows (graph capture) is left out.

        Args:
            before: ids and weights that the router chose.
            after: ids and weights that the call ends with, and the union.
        """
        ids = policy_ids.tolist()
        num_live = sum(policy_id != PAD for policy_id in ids)
        if num_live == 0:
            return
        rules = {i: self._rule(layer, self._definitions[i], num_live) for i in {*ids} - {PAD}}
        self._write(
            {
                "layer": layer.layer_id,
                "phase": plan.phase if plan else "GRAPH",
                "requests": list(plan.request_ids) if plan else None,
                "rows": [None if i == PAD else self._definitions[i].name for i in ids],
                "rules": [rules.get(i) for i in ids],
                "router_logits": _exact(router_logits),
                "base_ids": before[0].tolist(),
                "base_weights": _exact(before[1]),
                "final_ids": after[0].tolist(),
                "final_weights": _exact(after[1]),
                "union": after[2].nonzero().flatten().tolist(),
            }
        )

    def _rule(self, layer: Layer, definition: Definition, num_live: int) -> dict[str, Any]:
        """The numbers of a definition that differ from vanilla's, and the digest of its artifact.

        From the policy itself, not from the table that the kernels read.
        """
        policy, artifact = definition.policy, definition.artifact
        place = Place(layer.layer_id, num_live, layer.top_k, layer.num_experts)
        rule = policy.in_force(place).model_dump(exclude_defaults=True)
        if rule and isinstance(policy, TorchPolicy):
            return {"torch": policy.kind}
        if rule and artifact is not None:
            rule["similarity"] = artifact.sha256
            self._write_matrices(layer.layer_id, artifact)
        return rule

    def _write_matrices(self, layer: int, artifact: SimilarityArtifact) -> None:
        if (artifact.sha256, layer) in self._written and self._path.exists():
            return
        parts = {"similarity": artifact.matrices, "coefficients": artifact.coefficients}
        matrices = {name: _exact(part[layer]) for name, part in parts.items() if layer in part}
        self._write({"layer": layer, "artifact": artifact.sha256, "matrices": matrices})
        self._written.add((artifact.sha256, layer))

    def _write(self, entry: dict[str, Any]) -> None:
        is_new = not self._path.exists()
        with self._path.open("a") as file:
            if is_new:
                routers = {layer.layer_id: _describe(layer) for layer in self._layers}
                header = {"pid": os.getpid(), "layers": routers}
                file.write(json.dumps(header) + "\n")
                self._written.clear()
            file.write(json.dumps(entry) + "\n")


def _describe(layer: Layer) -> dict[str, Any]:
    router = layer.router
    return {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "free_slots": layer.free_slots.name.lower(),
        "scoring": router.scoring,
        "renormalize": router.renormalize,
        "scale": router.scale,
        "bias": None if router.bias is None else _exact(router.bias),
        "num_groups": router.num_groups,
        "top_groups": router.top_groups,
    }


def _exact(tensor: Tensor) -> list[Any]:
    return tensor.to(torch.float32).tolist()
