"""Similarity metrics: running sums over calibration tokens, and the matrix that they amount to.

Every expert is run on every calibration token (SERE, arXiv 2602.07616, section 3). No buffer holds
the outputs of all experts for all tokens: tokens come in blocks, and what is kept between blocks is
N x N (for ``cka``, N x sample x sample). Products are float32, sums over blocks float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .experts import Experts, Routing

BLOCK_BYTES = 256 << 20
LOWEST = -1e4
"""Stands for minus infinity in `routed`: an expert whose own output is zero has no stand-in."""


class Metric(ABC):
    """Sums of one MoE layer.

    Args:
        experts: the layer's experts.
        hidden_size: of the model.
        num_tokens: how many calibration tokens will come in all.
    """

    needs_tokens = True

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        self.experts = experts
        self.num_experts = experts.num_experts
        self.hidden_size = hidden_size
        self.num_tokens = num_tokens

    @abstractmethod
    def update(self, routing: Routing) -> None:
        """Take the tokens of one forward into account."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Similarity, float64 ``[N, N]`` on the CPU. Row u: who can stand in for u."""

    def notes(self) -> Mapping[str, object]:
        """What an operator should know of this layer's matrix; JSON values."""
        return {}

    def _blocks(self, routing: Routing) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Outputs float32 ``[N, block, hidden]``, ids and weights ``[block, top_k]``."""
        hidden = routing.hidden
        size = max(1, BLOCK_BYTES // (self.num_experts * hidden.shape[1] * 4))
        parts = (x.split(size) for x in (hidden, routing.topk_ids, routing.topk_weights))
        for tokens, ids, weights in zip(*parts, strict=True):
            yield run_all(self.experts, tokens), ids, weights


def run_all(experts: Experts, hidden: Tensor) -> Tensor:
    """Every expert on every token: float32 ``[N, num_tokens, hidden]``."""
    outputs = hidden.new_empty(experts.num_experts, *hidden.shape, dtype=torch.float32)
    for expert in range(experts.num_experts):
        outputs[expert] = experts.run(expert, hidden)
    return outputs


class Frobenius(Metric):
    """1 - d_uv / max(d), d_uv the Frobenius distance between the outputs of u and v on all tokens.

    Distances do not change when every expert's output loses their common mean; without it, little
    is lost to cancellation where experts are alike.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        self._gram = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)

    def update(self, routing: Routing) -> None:
        for outputs, _, _ in self._blocks(routing):
            outputs -= outputs.mean(dim=0)
            self._gram += _gram(outputs)

    def matrix(self) -> Tensor:
        distance = _distances(self._gram)
        return 1 - distance / distance.max().clamp_min(torch.finfo(torch.float64).tiny)


class Cosine(Metric):
    """(c + 1) / 2, c the mean over tokens of the cosine between the outputs of u and v.

    A zero output has cosine 0 with every other.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        self._sum = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)

    def update(self, routing: Routing) -> None:
        for outputs, _, _ in self._blocks(routing):
            self._sum += _gram(torch.nn.functional.normalize(outputs, dim=2, eps=1e-30))

    def matrix(self) -> Tensor:
        return _finished((self._sum / self.num_tokens + 1) / 2)


class CKA(Metric):
    """Linear centred kernel alignment on an evenly spaced sample of the tokens.

    ``<K_u, K_v> / (|K_u| |K_v|)`` with the centred ``K = A A^T``, which equals
    ``|A_v^T A_u|^2 / (|A_u^T A_u| |A_v^T A_v|)`` for centred outputs A (Kornblith et al., arXiv
    1905.00414, section 3). The sample is as large as N matrices of its square fit into 512 MiB.
    """

    KERNEL_BYTES = 512 << 20
    MOST_TOKENS = 2048

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        fits = int((self.KERNEL_BYTES / 4 / self.num_experts) ** 0.5)
        self._stride = -(-num_tokens // min(num_tokens, fits, self.MOST_TOKENS))
        self._sample: list[Tensor] = []
        self._num_seen = 0

    def update(self, routing: Routing) -> None:
        first = -self._num_seen % self._stride
        self._sample.append(routing.hidden[first :: self._stride].clone())
        self._num_seen += len(routing.hidden)

    def matrix(self) -> Tensor:
        sample = torch.cat(self._sample)
        kernels = sample.new_empty(self.num_experts, len(sample), len(sample), dtype=torch.float32)
        for expert in range(self.num_experts):
            outputs = self.experts.run(expert, sample).float()
            outputs = outputs - outputs.mean(dim=0)
            kernels[expert] = outputs @ outputs.T
        gram = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        for rows in kernels.split(64, dim=1):
            gram += _gram(rows)
        norms = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return _finished(gram / norms / norms[:, None])

    def notes(self) -> Mapping[str, object]:
        return {"cka_tokens": sum(map(len, self._sample))}


class Routed(Metric):
    """1 - the relative error of v in u's place, on the tokens that the router sends to u.

    ``Sim[u, v] = 1 - sqrt(sum w_u^2 |E_u - E_v|^2 / sum w_u^2 |E_u|^2)``, w_u being u's combine
    weight: 1 is a perfect stand-in, 0 as bad as dropping u, below 0 worse. An expert that got no
    token is measured on all tokens at equal weight.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        size = (self.num_experts, self.num_experts)
        self._error = torch.zeros(size, dtype=torch.float64)
        self._scale = torch.zeros(self.num_experts, dtype=torch.float64)
        self._gram = torch.zeros(size, dtype=torch.float64)
        self._energy = torch.zeros(self.num_experts, dtype=torch.float64)
        self._load = torch.zeros(self.num_experts, dtype=torch.int64)

    def update(self, routing: Routing) -> None:
        for outputs, ids, weights in self._blocks(routing):
            energy = outputs.square().sum(dim=2)  # [N, block]
            outputs -= outputs.mean(dim=0)
            self._gram += _gram(outputs)
            self._energy += energy.sum(dim=1).double().cpu()
            self._add_routed(outputs, energy, ids, self._squares(weights.float()))
            self._load += torch.bincount(ids.flatten().cpu(), minlength=self.num_experts)

    def _squares(self, weights: Tensor) -> Tensor:
        """What each slot counts: ``[block, top_k]``."""
        return weights.square()

    def _add_routed(self, outputs: Tensor, energy: Tensor, ids: Tensor, squares: Tensor) -> None:
        """Add w_u^2 |E_u - E_v|^2 to row u for every slot (token, u) and every v."""
        by_token = outputs.transpose(0, 1)  # [block, N, hidden]
        tokens = torch.arange(len(ids), device=ids.device)[:, None]
        own = by_token[tokens, ids]  # [block, top_k, hidden]
        norms = outputs.square().sum(dim=2).T  # [block, N]
        distances = norms[tokens, ids][:, :, None] + norms[:, None, :] - 2 * own @ by_token.mT
        weighted = squares[:, :, None] * distances.clamp_min(0)  # [block, top_k, N]
        error = torch.zeros(
            self.num_experts, self.num_experts, dtype=torch.float64, device=ids.device
        )
        error.index_add_(0, ids.flatten(), weighted.flatten(0, 1).double())
        scale = torch.zeros(self.num_experts, dtype=torch.float64, device=ids.device)
        scale.index_add_(0, ids.flatten(), (squares * energy.T.gather(1, ids)).flatten().double())
        self._error += error.cpu()
        self._scale += scale.cpu()

    def matrix(self) -> Tensor:
        is_measured = self._scale != 0
        error = torch.where(is_measured[:, None], self._error, _distances(self._gram).square())
        scale = torch.where(is_measured, self._scale, self._energy)[:, None]
        similarity = torch.where(scale == 0, LOWEST, 1 - (error / scale).sqrt())
        return similarity.clamp_min(LOWEST).fill_diagonal_(1)

    def notes(self) -> Mapping[str, object]:
        unused = (self._load == 0).nonzero().flatten().tolist()
        return {"experts_without_tokens": unused} if unused else {}


class Weights(Metric):
    """(c + 1) / 2, c the cosine between u and v as functions of white noise: without any data.

    ``c = <E_u, E_v> / (|E_u| |E_v|)`` with inner products over standard normal inputs x, estimated
    with a fixed seed: a number made of the experts' weights alone, and like the function itself
    indifferent to the order of their neurons.
    """

    needs_tokens = False
    NUM_INPUTS = 4096
    SEED = 0

    def update(self, routing: Routing) -> None:
        raise AssertionError("no tokens are needed")

    def matrix(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.SEED)
        noise = torch.randn(self.NUM_INPUTS, self.hidden_size, generator=generator)
        weight = next(self.experts.module.parameters())
        noise = noise.to(weight.device, weight.dtype)
        gram = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        size = max(1, BLOCK_BYTES // (self.num_experts * self.hidden_size * 4))
        for block in noise.split(size):
            gram += _gram(run_all(self.experts, block))
        norms = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return _finished((gram / norms / norms[:, None] + 1) / 2)


METRICS: Mapping[str, type[Metric]] = {
    "frobenius": Frobenius,
    "cosine": Cosine,
    "cka": CKA,
    "routed": Routed,
    "weights": Weights,
}


def _gram(outputs: Tensor) -> Tensor:
    """Inner products between experts: float32 ``[N, ...]`` -> float64 ``[N, N]`` on the CPU."""
    flat = outputs.flatten(1)
    return (flat @ flat.T).double().cpu()


def _distances(gram: Tensor) -> Tensor:
    """Euclidean distances from inner products; symmetric, diagonal 0."""
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return ((squares + squares.T) / 2).sqrt().fill_diagonal_(0)


def _finished(similarity: Tensor) -> Tensor:
    """Exactly symmetric, in [0, 1], with diagonal 1."""
    return ((similarity + similarity.T) / 2).clamp(0, 1).fill_diagonal_(1)
