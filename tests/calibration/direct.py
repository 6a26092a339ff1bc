"""Similarities computed directly: the whole model in memory, in float64, formulas written out.

Shares no code with the package. Outputs of all experts for all tokens lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@dataclass
class Layer:
    """All experts of one layer on all tokens.

    Attributes:
        outputs: float64 ``[N, num_tokens, hidden]``.
        weights: float64 ``[num_tokens, N]``, combine weights, 0 where the token does not go.
    """

    outputs: Tensor
    weights: Tensor


def run_whole_model(folder: Path, token_ids: Tensor) -> dict[int, Layer]:
    """One forward of the whole model in float64, and every expert on what its layer saw."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    layers: dict[int, Layer] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split(".")[2])
            module.register_forward_pre_hook(
                lambda m, args, layer=layer: layers.__setitem__(layer, _observe(m, *args))
            )
    with torch.no_grad():
        model(input_ids=token_ids, use_cache=False)
    return layers


def _observe(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Layer:
    num_experts = len(experts.down_proj)
    outputs = torch.stack([_run(experts, expert, hidden) for expert in range(num_experts)])
    dense = torch.zeros(len(hidden), num_experts, dtype=torch.float64)
    for token in range(len(hidden)):
        for slot in range(ids.shape[1]):
            dense[token, ids[token, slot]] += weights[token, slot]
    return Layer(outputs, dense)


def _run(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS
        mixed = x @ gate_up + experts.gate_up_proj_bias[expert]
        gate, up = mixed[:, 0::2].clamp(max=experts.limit), mixed[:, 1::2]
        up = up.clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        return inner @ down + experts.down_proj_bias[expert]
    half = len(gate_up) // 2
    gate, up = x @ gate_up[:half].T, x @ gate_up[half:].T
    return (gate * torch.sigmoid(gate) * up) @ down.T


def frobenius(layer: Layer) -> Tensor:
    distance = _pairs(layer, lambda u, v: (u - v).norm())
    return 1 - distance / distance.max()


def cosine(layer: Layer) -> Tensor:
    def mean_cosine(u: Tensor, v: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(u, v, dim=1).mean()

    return (_pairs(layer, mean_cosine) + 1) / 2


def cka(layer: Layer) -> Tensor:
    def aligned(u: Tensor, v: Tensor) -> Tensor:
        u, v = u - u.mean(dim=0), v - v.mean(dim=0)
        return (v.T @ u).norm() ** 2 / ((u.T @ u).norm() * (v.T @ v).norm())

    return _pairs(layer, aligned)


def routed(layer: Layer) -> Tensor:
    num_experts = len(layer.outputs)
    similarity = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for u in range(num_experts):
        squares = layer.weights[:, u] ** 2
        if float(squares.sum()) == 0:
            squares = torch.ones_like(squares)
        scale = (squares * layer.outputs[u].square().sum(dim=1)).sum()
        for v in range(num_experts):
            error = (layer.outputs[u] - layer.outputs[v]).square().sum(dim=1)
            similarity[u, v] = 1 - ((squares * error).sum() / scale).sqrt()
    return similarity


def joint(layer: Layer) -> Tensor:
    """Slot by slot: the change of a token's sum with v in u's place, less the change without."""
    num_experts, num_tokens, _ = layer.outputs.shape
    mean = layer.outputs.mean(dim=0)
    cost = torch.zeros(num_experts, num_experts + 1, dtype=torch.float64)  # last: no expert
    for token in range(num_tokens):
        weights = layer.weights[token]
        used = weights.nonzero().flatten().tolist()
        first = int(weights.argmax())
        outputs = layer.outputs[:, token]
        instead = torch.cat([outputs, torch.zeros_like(outputs[:1])])
        for u in used:
            others = [t for t in used if t not in (u, first)]
            rest = sum((weights[t] * (mean[token] - outputs[t]) for t in others), 0 * mean[token])
            moved = weights[u] * (instead - outputs[u]) + rest
            cost[u] += moved.square().sum(dim=1) - rest.square().sum()
    relative = cost[:, :-1] / cost[:, -1:]
    similarity = 1 - relative.sign() * relative.abs().sqrt()
    is_used = (layer.weights > 0).any(dim=0)
    return torch.where(is_used[:, None], similarity, routed(layer))


def least_squares(layer: Layer) -> Tensor:
    """The part of u's weighted outputs that is gone after the best multiple of v's, if any."""

    def explained(u: Tensor, v: Tensor) -> Tensor:
        best = ((u @ v) / (v @ v)).clamp_min(0)
        return 1 - (u - best * v).square().sum() / u.square().sum()

    return _fits(layer, explained)


def least_squares_coefficients(layer: Layer) -> Tensor:
    return _fits(layer, lambda u, v: ((u @ v) / (v @ v)).clamp(0, 1))


def _fits(layer: Layer, fit: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of u and each v: outputs on u's tokens times u's weights, in one vector."""
    num_experts = len(layer.outputs)
    found = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for u in range(num_experts):
        weights = layer.weights[:, u]
        if float(weights.abs().sum()) == 0:
            weights = torch.ones_like(weights)
        scaled = (weights[:, None] * layer.outputs).flatten(1)
        for v in range(num_experts):
            found[u, v] = fit(scaled[u], scaled[v])
    return found


METRICS: Mapping[str, Callable[[Layer], Tensor]] = {
    "frobenius": frobenius,
    "cosine": cosine,
    "cka": cka,
    "routed": routed,
    "joint": joint,
    "least_squares": least_squares,
}
COEFFICIENTS: Mapping[str, Callable[[Layer], Tensor]] = {
    "least_squares": least_squares_coefficients
}


def _pairs(layer: Layer, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack([torch.stack([measure(u, v) for v in layer.outputs]) for u in layer.outputs])
