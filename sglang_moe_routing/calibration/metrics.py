"""Similarity metrics: running sums over calibration tokens, and the matrix that they amount to.

Every expert is run on every calibration token (SERE, arXiv 2602.07616, section 3). No buffer holds
the outputs of all experts for all tokens: tokens come in blocks, and what is kept between blocks is
N x N (for ``cka``, N x sample x sample). Products are float32, sums over blocks float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

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
        self._gram = self._zeros()

    @abstractmethod
    def update(self, routing: Routing) -> None:
        """Take the tokens of one forward into account."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Similarity, float64 ``[N, N]`` on the CPU. Row u: who can stand in for u."""

    def coefficients(self) -> Tensor | None:
        """Factor of the slot's weight when v stands in for u, float64 ``[N, N]`` on the CPU, in
        [0, 1]; None where the metric has none."""
        return None

    def notes(self) -> Mapping[str, object]:
        """What an operator should know of this layer's matrix; JSON values."""
        return {}

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)

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

    def update(self, routing: Routing) -> None:
        for outputs, _, _ in self._blocks(routing):
            self._gram += _gram(torch.nn.functional.normalize(outputs, dim=2, eps=1e-30))

    def matrix(self) -> Tensor:
        return _finished((self._gram / self.num_tokens + 1) / 2)


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
        gram = self._zeros()
        for rows in kernels.split(64, dim=1):
            gram += _gram(rows)
        return _finished(_cosines(gram))

    def notes(self) -> Mapping[str, object]:
        return {"cka_tokens": sum(map(len, self._sample))}


@dataclass(frozen=True)
class _Block:
    """Some tokens: their experts' outputs without the mean over all experts, and their routing.

    Attributes:
        outputs: float32 ``[block, N, hidden]``, each minus `mean`.
        mean: float32 ``[block, hidden]``.
        ids: int64 ``[block, top_k]``.
        weights: float32 ``[block, top_k]``.
    """

    outputs: Tensor
    mean: Tensor
    ids: Tensor
    weights: Tensor

    @cached_property
    def own(self) -> Tensor:
        """Outputs of each token's own experts: ``[block, top_k, hidden]``."""
        return _own(self.outputs, self.ids)

    @cached_property
    def products(self) -> Tensor:
        """Inner products of a token's own experts u with all experts v: ``[block, top_k, N]``."""
        return self.own @ self.outputs.mT

    @cached_property
    def distances(self) -> Tensor:
        """|E_u - E_v|^2 for a token's own experts u and all v: ``[block, top_k, N]``."""
        norms = _norms(self.outputs, (2,))
        own = norms.gather(1, self.ids)
        return (own[:, :, None] + norms[:, None, :] - 2 * self.products).clamp_min(0)


class RoutedTokens(Metric):
    """Sums for each expert over the tokens that the router sends to it.

    An expert that got no token is measured on all tokens at equal weight.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        self._load = torch.zeros(self.num_experts, dtype=torch.int64)

    def _count(self, ids: Tensor) -> None:
        self._load += torch.bincount(ids.flatten().cpu(), minlength=self.num_experts)

    def notes(self) -> Mapping[str, object]:
        unused = (self._load == 0).nonzero().flatten().tolist()
        return {"experts_without_tokens": unused} if unused else {}


class Routed(RoutedTokens):
    """1 - the relative error of v in u's place, on the tokens that the router sends to u.

    ``Sim[u, v] = 1 - sqrt(sum w_u^2 |E_u - E_v|^2 / sum w_u^2 |E_u|^2)``, w_u being u's combine
    weight: 1 is a perfect stand-in, 0 as bad as dropping u, below 0 worse.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        self._error = self._zeros()
        self._scale = torch.zeros(self.num_experts, dtype=torch.float64)
        self._energy = torch.zeros(self.num_experts, dtype=torch.float64)

    def update(self, routing: Routing) -> None:
        for outputs, ids, weights in self._blocks(routing):
            self._energy += _norms(outputs, (1, 2)).double().cpu()
            mean = outputs.mean(dim=0)
            outputs -= mean
            self._gram += _gram(outputs)
            self._count(ids)
            block = _Block(outputs.transpose(0, 1), mean, ids, weights.float())
            cost, drop = self._costs(block)
            self._error += _by_expert(ids, cost, self.num_experts)
            self._scale += _by_expert(ids, drop[:, :, None], self.num_experts)[:, 0]

    def _costs(self, block: _Block) -> tuple[Tensor, Tensor]:
        """What each slot loses with v in its expert's place ``[block, top_k, N]``, and without any
        expert ``[block, top_k]``."""
        squares = block.weights.square()
        drop = squares * _norms(block.own + block.mean[:, None], (2,))
        return squares[:, :, None] * block.distances, drop

    def matrix(self) -> Tensor:
        is_measured = ~(self._scale <= 0)  # NaN is measured: it must not be lost
        error = torch.where(is_measured[:, None], self._error, _distances(self._gram).square())
        scale = torch.where(is_measured, self._scale, self._energy)[:, None]
        relative = error / scale
        similarity = 1 - relative.sign() * relative.abs().sqrt()
        return torch.where(scale == 0, LOWEST, similarity).clamp_min(LOWEST).fill_diagonal_(1)


class Joint(Routed):
    """`routed`, given that the token's other secondary experts are replaced too.

    SERE replaces several experts of a token at once, and what counts is how far their sum moves. So
    the loss of v in u's place is taken with the others' expected loss, each of them replaced by the
    mean expert M::

        cost[u, v] = sum w_u^2 |E_v - E_u|^2 + 2 w_u <E_v - E_u, r_u>
        r_u = sum over t != u of w_t (M - E_t), t a secondary expert of the token
        Sim[u, v] = 1 - sign(e) sqrt|e|, e = cost[u, v] / cost[u, nothing]

    Secondary are all but the one of the highest weight. 0 is as bad as dropping u; above 1 are
    stand-ins that also make up for what the others lose.
    """

    def _costs(self, block: _Block) -> tuple[Tensor, Tensor]:
        weights = block.weights
        is_primary = torch.zeros_like(weights, dtype=torch.bool)
        is_primary.scatter_(1, weights.argmax(dim=1, keepdim=True), True)
        secondary = weights.masked_fill(is_primary, 0)  # [block, top_k]
        lost = (secondary[:, :, None] * block.own).sum(dim=1)  # [block, hidden]: -r, with u's part

        along = (block.outputs @ lost[:, :, None])[:, None, :, 0]  # <E_v, lost>: [block, 1, N]
        aligned = along - secondary[:, :, None] * block.products  # <E_v, -r_u>: [block, top_k, N]
        own = aligned.gather(2, block.ids[:, :, None])  # <E_u, -r_u>
        mean = (lost[:, None] - secondary[:, :, None] * block.own) @ block.mean[:, :, None]

        cost, drop = super()._costs(block)
        cost = cost - 2 * weights[:, :, None] * (aligned - own)
        return cost, drop + 2 * weights * (own + mean)[:, :, 0]


class LeastSquares(RoutedTokens):
    """The share of u's output that the best multiple of v explains.

    Over the tokens that the router sends to u, w_u being u's combine weight, ``|E_u - c E_v|^2`` is
    least at ``c = g / n_v``, and then smaller than ``|E_u|^2`` by the share Sim::

        g = sum w_u^2 <E_u, E_v>, n_v = sum w_u^2 |E_v|^2, n_u = sum w_u^2 |E_u|^2
        Sim[u, v] = max(g, 0)^2 / (n_v n_u)
        coefficient[u, v] = clamp(g / n_v, 0, 1)

    0: v explains nothing, or would have to be subtracted. Nothing is centred, for no difference of
    large numbers is taken.
    """

    def __init__(self, experts: Experts, hidden_size: int, num_tokens: int):
        super().__init__(experts, hidden_size, num_tokens)
        self._product = self._zeros()
        self._norm = self._zeros()

    def update(self, routing: Routing) -> None:
        for stacked, ids, weights in self._blocks(routing):
            self._gram += _gram(stacked)
            self._count(ids)
            outputs = stacked.transpose(0, 1)  # [block, N, hidden]
            squares = weights.float().square()[:, :, None]
            products = _own(outputs, ids) @ outputs.mT  # [block, top_k, N]
            norms = _norms(outputs, (2,))[:, None]  # [block, 1, N]
            self._product += _by_expert(ids, squares * products, self.num_experts)
            self._norm += _by_expert(ids, squares * norms, self.num_experts)

    def matrix(self) -> Tensor:
        product, norm = self._sums()
        scale = norm * norm.diagonal()[:, None]
        share = product.clamp_min(0).square() / scale.where(scale.isfinite(), torch.nan)
        return torch.where(scale == 0, 0, share).clamp_max(1).fill_diagonal_(1)

    def coefficients(self) -> Tensor:
        product, norm = self._sums()
        return torch.where(norm == 0, 0, product / norm).clamp(0, 1).fill_diagonal_(1)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """g and n_v, both ``[N, N]``."""
        is_measured = ~(self._norm.diagonal() <= 0)[:, None]  # NaN is measured
        product = torch.where(is_measured, self._product, self._gram)
        return product, torch.where(is_measured, self._norm, self._gram.diagonal())


class WithoutTokens(Metric):
    """What the weights alone say."""

    needs_tokens = False

    def update(self, routing: Routing) -> None:
        raise AssertionError("no tokens are needed")


class Weights(WithoutTokens):
    """(c + 1) / 2, c the cosine between u and v as functions of white noise: without any data.

    ``c = <E_u, E_v> / (|E_u| |E_v|)`` with inner products over standard normal inputs x, estimated
    with a fixed seed: a number made of the experts' weights alone, and like the function itself
    indifferent to the order of their neurons.
    """

    NUM_INPUTS = 4096
    SEED = 0

    def matrix(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.SEED)
        noise = torch.randn(self.NUM_INPUTS, self.hidden_size, generator=generator)
        weight = next(self.experts.module.parameters())
        noise = noise.to(weight.device, weight.dtype)
        size = max(1, BLOCK_BYTES // (self.num_experts * self.hidden_size * 4))
        gram = self._zeros()
        for block in noise.split(size):
            gram += _gram(run_all(self.experts, block))
        return _finished((_cosines(gram) + 1) / 2)


class RouterRows(WithoutTokens):
    """(c + 1) / 2, c the cosine between the router's rows of u and v: without any data.

    A router learns to send alike tokens to alike experts, so it knows who they are.
    """

    def matrix(self) -> Tensor:
        rows = self.experts.router(self.hidden_size).double().cpu()
        rows = torch.nn.functional.normalize(rows, dim=1, eps=1e-30)
        return _finished((rows @ rows.T + 1) / 2)


METRICS: Mapping[str, type[Metric]] = {
    "frobenius": Frobenius,
    "cosine": Cosine,
    "cka": CKA,
    "routed": Routed,
    "joint": Joint,
    "least_squares": LeastSquares,
    "weights": Weights,
    "router": RouterRows,
}


def _gram(outputs: Tensor) -> Tensor:
    """Inner products between experts: float32 ``[N, ...]`` -> float64 ``[N, N]`` on the CPU."""
    flat = outputs.flatten(1)
    return (flat @ flat.T).double().cpu()


def _cosines(gram: Tensor) -> Tensor:
    """Cosines from inner products; 0 with what is zero."""
    norms = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return gram / norms / norms[:, None]


def _norms(outputs: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Sums of squares over `dim`, without a copy of `outputs` on the way."""
    norms: Tensor = torch.linalg.vector_norm(outputs, dim=dim)
    return norms.square()


def _own(outputs: Tensor, ids: Tensor) -> Tensor:
    """Of all outputs ``[block, N, hidden]`` those of each token's own experts ``[block, top_k]``:
    ``[block, top_k, hidden]``."""
    return outputs[torch.arange(len(ids), device=ids.device)[:, None], ids]


def _by_expert(ids: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """Sum of `values` ``[block, top_k, n]`` over the slots of each expert: float64 ``[N, n]``."""
    sums = torch.zeros(num_experts, values.shape[2], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, ids.flatten(), values.flatten(0, 1).double()).cpu()


def _distances(gram: Tensor) -> Tensor:
    """Euclidean distances from inner products; symmetric, diagonal 0."""
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return ((squares + squares.T) / 2).sqrt().fill_diagonal_(0)


def _finished(similarity: Tensor) -> Tensor:
    """Exactly symmetric, in [0, 1], with diagonal 1."""
    return ((similarity + similarity.T) / 2).clamp(0, 1).fill_diagonal_(1)
