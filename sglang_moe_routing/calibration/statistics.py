"""Numbers that say how far a similarity artifact can be trusted, and how two of them agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..artifacts import SimilarityArtifact
from ..errors import ArtifactError

QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
ISOLATED = 5
TOP = 5


@dataclass(frozen=True)
class Isolated:
    """An expert that is hard to replace, with the best that can stand in for it."""

    expert: int
    nearest: int
    similarity: float


@dataclass(frozen=True)
class Hub:
    """An expert that is the nearest one of `count` others."""

    expert: int
    count: int


@dataclass(frozen=True)
class ValueStatistics:
    """The values of one matrix. The diagonal counts nowhere.

    Attributes:
        mean: mean value.
        quantiles: name of `QUANTILES` -> value.
        nearest_mean: mean over experts of the value of their nearest expert.
    """

    mean: float
    quantiles: Mapping[str, float]
    nearest_mean: float


@dataclass(frozen=True)
class LayerStatistics:
    """What one matrix says about its layer. The diagonal counts nowhere.

    Attributes:
        layer: layer id.
        mean: mean similarity.
        quantiles: name of `QUANTILES` -> similarity.
        nearest_mean: mean over experts of the similarity of their nearest expert.
        share_without_neighbour: rho -> share of experts, in [0, 1], that SERE treats as critical
            even if the batch loads every other expert: no similarity at or above rho.
        most_isolated: at most `ISOLATED` experts with the least similar nearest expert, worst
            first.
        distinct_neighbours: number of experts that are the nearest of at least one other.
        largest_hub: the expert that most others have as their nearest.
        coefficients: None where the metric has none.
    """

    layer: int
    mean: float
    quantiles: Mapping[str, float]
    nearest_mean: float
    share_without_neighbour: Mapping[float, float]
    most_isolated: Sequence[Isolated]
    distinct_neighbours: int
    largest_hub: Hub
    coefficients: ValueStatistics | None = None


@dataclass(frozen=True)
class LayerAgreement:
    """How far two matrices of one layer order the same stand-ins in the same way.

    Attributes:
        layer: layer id.
        argmax_agreement: share of experts that have the same nearest expert in both.
        top5_overlap: mean share of an expert's `TOP` nearest that both have in common.
        rank_correlation: mean over rows of Spearman's rank correlation, in [-1, 1].
        rank_correlation_p05: its 5 % quantile over rows.
    """

    layer: int
    argmax_agreement: float
    top5_overlap: float
    rank_correlation: float
    rank_correlation_p05: float


@dataclass(frozen=True)
class Comparison:
    """Agreement of two artifacts.

    Attributes:
        chance: `argmax_agreement` of unrelated matrices, ``1 / (N - 1)``.
        layers: one entry for each layer that both have.
        mean: attribute of `LayerAgreement` -> its mean over `layers`.
        only_here: layers that only the first artifact has.
        only_there: layers that only the second artifact has.
    """

    chance: float
    layers: Sequence[LayerAgreement]
    mean: Mapping[str, float]
    only_here: Sequence[int]
    only_there: Sequence[int]


def layer_statistics(
    layer: int, matrix: Tensor, rhos: Sequence[float], coefficients: Tensor | None = None
) -> LayerStatistics:
    """Describe one layer. Ties go to the lowest expert id.

    Args:
        layer: layer id.
        matrix: ``[N, N]`` similarities, finite.
        rhos: thresholds of `LayerStatistics.share_without_neighbour`.
        coefficients: ``[N, N]``, finite, where the metric has them.

    Raises:
        ArtifactError: there is a single expert.
    """
    best, nearest = nearest_experts(matrix)
    counts = nearest.bincount(minlength=matrix.shape[0])
    hub = int(counts.argmax())
    return LayerStatistics(
        layer=layer,
        **asdict(_values(matrix, nearest)),
        share_without_neighbour={rho: _share_below(best, rho) for rho in rhos},
        most_isolated=_most_isolated(best, nearest),
        distinct_neighbours=int((counts > 0).sum()),
        largest_hub=Hub(hub, int(counts[hub])),
        coefficients=None if coefficients is None else _values(coefficients, nearest),
    )


def compare(here: SimilarityArtifact, there: SimilarityArtifact) -> Comparison:
    """Compare the layers that two artifacts share. Ranks are compared, so metrics may differ.

    Raises:
        ArtifactError: the artifacts differ in their number of experts, share no layer, or have a
            single expert.
    """
    if here.num_experts != there.num_experts:
        raise ArtifactError(
            f"{there.num_experts} experts, expected {here.num_experts}: "
            "only artifacts of the same architecture can be compared"
        )
    common = sorted(set(here.layers) & set(there.layers))
    if not common:
        raise ArtifactError(
            f"has layers {spans(there.layers)}, none of the layers {spans(here.layers)}"
        )
    found = [layer_agreement(i, here.matrices[i], there.matrices[i]) for i in common]
    names = ("argmax_agreement", "top5_overlap", "rank_correlation", "rank_correlation_p05")
    return Comparison(
        chance=1 / (here.num_experts - 1),
        layers=found,
        mean={name: sum(getattr(one, name) for one in found) / len(found) for name in names},
        only_here=sorted(set(here.layers) - set(common)),
        only_there=sorted(set(there.layers) - set(common)),
    )


def layer_agreement(layer: int, here: Tensor, there: Tensor) -> LayerAgreement:
    """Compare two ``[N, N]`` matrices row by row. Ties go to the lowest expert id.

    Raises:
        ArtifactError: there is a single expert.
    """
    same = nearest_experts(here)[1] == nearest_experts(there)[1]
    first, second = _top(here), _top(there)
    shared = (first[:, :, None] == second[:, None, :]).any(dim=2)
    correlation = rank_correlation(off_diagonal(here), off_diagonal(there))
    return LayerAgreement(
        layer=layer,
        argmax_agreement=float(same.double().mean()),
        top5_overlap=float(shared.double().mean()),
        rank_correlation=float(correlation.mean()),
        rank_correlation_p05=float(correlation.quantile(0.05)),
    )


def off_diagonal(matrix: Tensor) -> Tensor:
    """Rows of an ``[N, N]`` matrix without their diagonal entries: float32 ``[N, N - 1]``.

    Raises:
        ArtifactError: there is a single expert.
    """
    count = matrix.shape[0]
    if count < 2:
        raise ArtifactError("has 1 expert per layer, expected at least 2: nothing can be re-routed")
    return matrix.float()[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)


def nearest_experts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity (float32 ``[N]``) and id (int64 ``[N]``) of each expert's nearest other one."""
    others = matrix.float().clone().fill_diagonal_(-torch.inf)
    nearest = others.argmax(dim=1)  # first maximum: ties to the lowest id
    return others.gather(1, nearest[:, None])[:, 0], nearest


def rank_correlation(here: Tensor, there: Tensor) -> Tensor:
    """Spearman's rank correlation of each pair of rows.

    Args:
        here: ``[R, M]``, finite.
        there: ``[R, M]``, finite.

    Returns:
        float64 ``[R]`` in [-1, 1]; 0 where a row is constant, for it orders nothing.
    """
    first, second = _centred_ranks(here), _centred_ranks(there)
    return torch.nn.functional.cosine_similarity(first, second, dim=1).clamp(-1, 1)


def spans(ids: Sequence[int]) -> str:
    """Ascending ids in short, such as ``0-3,7``."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def _values(matrix: Tensor, nearest: Tensor) -> ValueStatistics:
    values = off_diagonal(matrix).double()
    points = torch.tensor(list(QUANTILES.values()), dtype=values.dtype)
    quantiles = values.flatten().quantile(points).tolist()
    return ValueStatistics(
        mean=float(values.mean()),
        quantiles=dict(zip(QUANTILES, quantiles, strict=True)),
        nearest_mean=float(matrix.double().gather(1, nearest[:, None]).mean()),
    )


def _share_below(best: Tensor, rho: float) -> float:
    threshold = torch.tensor(rho, dtype=best.dtype)  # rounded as the engine rounds it
    return float((best < threshold).double().mean())


def _most_isolated(best: Tensor, nearest: Tensor) -> list[Isolated]:
    order = best.sort(stable=True).indices[:ISOLATED].tolist()
    return [Isolated(i, int(nearest[i]), float(best[i])) for i in order]


def _top(matrix: Tensor) -> Tensor:
    """Ids of each expert's `TOP` nearest others (all, if there are fewer), nearest first."""
    others = matrix.float().clone().fill_diagonal_(-torch.inf)
    count = min(TOP, matrix.shape[0] - 1)
    return others.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _centred_ranks(rows: Tensor) -> Tensor:
    """Ranks within each row less their mean, float64 ``[R, M]``; ties share their mean rank."""
    rows = rows.contiguous()
    ordered = rows.sort(dim=1).values
    below = torch.searchsorted(ordered, rows)
    up_to = torch.searchsorted(ordered, rows, right=True)
    return (below + up_to).double() / 2 - rows.shape[1] / 2
