"""`least_squares` on outputs that trained models do not give: zeros, copies, opposites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from sglang_moe_routing.calibration.experts import ExpertList, Routing
from sglang_moe_routing.calibration.metrics import LeastSquares

TOKENS, EXPERTS, TOP_K, HIDDEN = 6, 5, 2, 3


def found(outputs: Tensor, weights: Tensor, num_batches: int = 1) -> tuple[Tensor, Tensor]:
    """Similarity and coefficients of experts with the given outputs.

    Args:
        outputs: ``[N, num_tokens, hidden]``.
        weights: ``[num_tokens, N]``, 0 where the token does not go.
    """
    num_experts, num_tokens, hidden = outputs.shape
    size = max(num_tokens, hidden)
    tables = torch.zeros(num_experts, size, size)
    tables[:, :hidden, :num_tokens] = outputs.mT
    experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(num_experts))
    for expert, table in zip(experts, tables, strict=True):
        expert.weight = nn.Parameter(table, requires_grad=False)
    metric = LeastSquares(
        ExpertList("experts", experts, nn.Module(), num_experts), size, num_tokens
    )
    top_k = int((weights != 0).sum(dim=1).max())
    kept, ids = weights.float().topk(top_k, dim=1)
    parts = (torch.eye(num_tokens, size), ids, kept)
    for hidden_states, ids, kept in zip(*(x.chunk(num_batches) for x in parts), strict=True):
        metric.update(Routing(hidden_states, ids, kept, hidden_states))
    return metric.matrix(), metric.coefficients()


def expected(outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas written out in float64; a pair of which one is zero on all tokens has zeros."""
    outputs, weights = outputs.double(), weights.double()
    num_experts = len(outputs)
    similarity, coefficients = torch.eye(num_experts).double(), torch.eye(num_experts).double()
    for u in range(num_experts):
        squares = weights[:, u].square()
        if float((squares[:, None] * outputs[u].square()).sum()) == 0:
            squares = torch.ones_like(squares)
        for v in range(num_experts):
            product = float((squares[:, None] * outputs[u] * outputs[v]).sum())
            norm_u = float((squares[:, None] * outputs[u].square()).sum())
            norm_v = float((squares[:, None] * outputs[v].square()).sum())
            if u != v and norm_u > 0 and norm_v > 0:
                similarity[u, v] = max(product, 0) ** 2 / (norm_u * norm_v)
                coefficients[u, v] = min(max(product / norm_v, 0), 1)
    return similarity, coefficients


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Outputs with many equal, opposite and zero entries; experts that no token goes to."""
    entries = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, 3.0])
    outputs = draw(arrays.arrays("float64", (EXPERTS, TOKENS, HIDDEN), elements=entries))
    scales = draw(arrays.arrays("float64", EXPERTS, elements=st.sampled_from([1e-6, 1.0, 1e6])))
    weights = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    for token in range(TOKENS):
        pair = draw(
            st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
        )
        shares = draw(st.lists(st.sampled_from([0.125, 0.5, 2.0]), min_size=TOP_K, max_size=TOP_K))
        weights[token, pair] = torch.tensor(shares, dtype=torch.float64)
    return torch.from_numpy(outputs) * torch.from_numpy(scales)[:, None, None], weights


@settings(deadline=None)
@given(cases(), st.integers(1, 3))
def test_odd_outputs_give_what_the_formulas_give(
    case: tuple[Tensor, Tensor], num_batches: int
) -> None:
    """Finite, in [0, 1] with diagonal 1, whatever is zero."""
    for got, made in zip(found(*case, num_batches), expected(*case), strict=True):
        assert bool(((got >= 0) & (got <= 1)).all())
        assert bool((got.diagonal() == 1).all())
        torch.testing.assert_close(got, made, rtol=1e-5, atol=1e-6)


def outputs_of(*rows: list[float]) -> Tensor:
    """One token, hidden size 2."""
    return torch.tensor(rows)[:, None]


def test_multiples_explain_all_and_opposites_nothing() -> None:
    """E_1 = 2 E_0, E_2 = E_0 / 2, E_3 = -E_0, E_4 at right angles, E_5 half way to it."""
    outputs = outputs_of([1, 0], [2, 0], [0.5, 0], [-1, 0], [0, 1], [1, 1])
    similarity, coefficients = found(outputs, torch.ones(1, 6))
    torch.testing.assert_close(similarity[0], torch.tensor([1, 1, 1, 0, 0, 0.5]).double())
    torch.testing.assert_close(coefficients[0], torch.tensor([1, 0.5, 1, 0, 0, 0.5]).double())
    torch.testing.assert_close(coefficients[:3, 1], torch.tensor([0.5, 1, 0.25]).double())


def test_zero_experts_are_no_stand_ins_and_have_none() -> None:
    similarity, coefficients = found(outputs_of([1, 0], [0, 0], [1, 1]), torch.ones(1, 3))
    for matrix in (similarity, coefficients):
        assert matrix[1].tolist() == [0, 1, 0]
        assert matrix[:, 1].tolist() == [0, 1, 0]


def test_large_tokens_and_large_weights_count_by_their_squares() -> None:
    """Two tokens of expert 0: at one expert 1 equals it, at the other it is at right angles."""
    outputs = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])
    weights = torch.tensor([[3.0, 0], [1, 0]])
    similarity, coefficients = found(outputs, weights)
    assert float(coefficients[0, 1]) == pytest.approx(9 / 10)
    assert float(similarity[0, 1]) == pytest.approx(81 / 100)
    assert float(coefficients[1, 0]) == pytest.approx(1 / 2)  # no token: both at equal weight
    assert float(similarity[1, 0]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_outputs_without_a_finite_norm_show(value: Any) -> None:
    """Beside every expert that is sound, so that a run can stop: never as a zero."""
    similarity, _ = found(outputs_of([1, 0], [value, 1], [1, 1]), torch.ones(1, 3))
    assert bool(similarity[[0, 2], 1].isnan().all())
    assert bool(similarity[1, [0, 2]].isnan().all())
