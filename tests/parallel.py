"""A Qwen3-MoE model decoded under a policy by one masked forward of plain transformers, in float32.

Step t of a batch is made of the t-th tokens of its sequences. Routing at step t needs nothing that
comes after t, so a forward of whole sequences, its layers routing step by step, equals a decode
token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sglang_moe_routing.artifacts import SimilarityArtifact
from sglang_moe_routing.policies import FreeSlots, Policy, Router, build_table, reroute


class ParallelForward:
    """Routes the model's MoE layers.

    Args:
        batch_size: sequences that advance together.
        prefix_len: tokens of each prompt, which no policy routes and which do not count.
    """

    def __init__(self, folder: Path, *, batch_size: int, prefix_len: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.batch_size = batch_size
        self.prefix_len = prefix_len
        self.policy: Policy
        self.artifact: SimilarityArtifact | None = None
        self.active: list[Tensor] = []
        for layer, block in enumerate(self.model.model.layers):
            _RoutedBlock(self, layer, block.mlp)

    def run(
        self, rows: Tensor, policy: Policy, artifact: SimilarityArtifact | None = None
    ) -> tuple[Tensor, float]:
        """Mean loss of each sequence (float64, nats), and T.

        Args:
            rows: int64 ``[num_sequences, length + 1]``, batch by batch. The first
                ``prefix_len + 1`` tokens are given, each later one is scored.
            artifact: if the policy uses one.
        """
        self.policy, self.artifact, self.active = policy, artifact, []
        with torch.no_grad():
            losses = torch.cat([self._losses(batch) for batch in rows.split(self.batch_size)])
        return losses, float(torch.stack(self.active).double().mean())

    def _losses(self, batch: Tensor) -> Tensor:
        targets = batch[:, self.prefix_len + 1 :]
        output = self.model(
            input_ids=batch[:, :-1], use_cache=False, logits_to_keep=targets.shape[1]
        )
        losses = nn.functional.cross_entropy(
            output.logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return losses.view_as(targets).double().mean(dim=1)


class _RoutedBlock:
    def __init__(self, forward: ParallelForward, layer: int, block: nn.Module) -> None:
        self._forward = forward
        self._layer = layer
        self._logits: Tensor
        block.gate.register_forward_hook(self._keep_logits)
        block.experts.register_forward_pre_hook(self._route)

    def _keep_logits(self, gate: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._logits = output[0]

    def _route(self, experts: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Change the arguments of the experts: hidden states, top-k ids, top-k weights."""
        hidden, ids, weights = arguments
        forward, artifact = self._forward, self._forward.artifact
        table = build_table(
            [forward.policy],
            layer=self._layer,
            top_k=ids.shape[1],
            num_experts=self._logits.shape[1],
            similarity={"": artifact.matrices[self._layer]} if artifact else {},
            coefficients=(
                {"": artifact.coefficients[self._layer]}
                if artifact and artifact.coefficients
                else {}
            ),
            artifacts=["" if artifact else None],
        )
        scores, gates = (self._by_sequence(x) for x in Router().score(self._logits))
        ids, weights = self._by_sequence(ids.clone()), self._by_sequence(weights.clone())
        for step in range(forward.prefix_len, ids.shape[1]):
            routed = reroute(
                *(x[:, step] for x in (scores, gates, ids, weights)),
                torch.zeros(forward.batch_size, dtype=torch.int64),
                table,
                renormalize=True,
                free_slots=FreeSlots.REPEAT_FIRST,  # the model's own code takes no id below 0
            )
            ids[:, step], weights[:, step] = routed.topk_ids, routed.topk_weights
            forward.active.append(routed.active)
        return hidden, ids.flatten(0, 1), weights.flatten(0, 1)

    def _by_sequence(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self._forward.batch_size, -1))
