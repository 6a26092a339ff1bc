"""`Router.score` against the oracle of what a model's router computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_moe_routing.policies import FREE, OEA, Router, Vanilla, build_table, reroute
from sglang_moe_routing.testing import oracle

thorough = settings(max_examples=200, deadline=None, database=None)


def assert_close(gates: Tensor, expected: Tensor) -> None:
    """Equal up to float32 exp, division and a sum of up to 64 terms."""
    torch.testing.assert_close(gates.double(), expected.double(), rtol=1e-5, atol=1e-7)


def ranking(scores: Tensor) -> list[list[int]]:
    """All experts of every row, by falling score, ties to the lower id, NaN last."""
    everyone = list(range(scores.shape[1]))
    return [oracle.in_rank_order(everyone, row) for row in scores.tolist()]


@st.composite
def calls(draw: st.DrawFn, scoring: str, biased: bool, grouped: bool) -> dict[str, Any]:
    """A router and logits on which float32 and float64 agree about every order.

    Logits are multiples of 1/16 in [-4, 4]; with a bias, see `keeps_apart`.
    """
    num_groups = draw(st.sampled_from((2, 3, 4, 8))) if grouped else 1
    size = draw(st.integers(2, 8)) if grouped else draw(st.integers(2, 40))
    num_experts = num_groups * size
    top_groups = draw(st.integers(1, num_groups)) if grouped else 1
    top_k = draw(st.integers(1, min(8, top_groups * size if grouped else num_experts)))
    num_rows = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bias = None
    while True:
        steps = [rng.integers(0, 129, num_experts) for _ in range(num_rows)]
        if grouped or biased:  # no two experts of a row tie
            steps = [rng.permutation(129)[:num_experts] for _ in range(num_rows)]
        logits = np.array(steps, dtype=np.float32).reshape(num_rows, num_experts) / 16 - 4
        if not biased:
            break
        bias = rng.uniform(-0.5, 0.5, num_experts).astype(np.float32)
        if keeps_apart(logits, bias, num_groups):
            break
    return {
        "logits": logits,
        "k": top_k,
        "scoring": scoring,
        "bias": bias,
        "n_groups": num_groups if grouped else None,
        "best_groups": top_groups if grouped else None,
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from((1.0, 2.5))),
    }


def keeps_apart(logits: np.ndarray, bias: np.ndarray, num_groups: int) -> bool:
    """Whether rounding, below 1e-6 in numbers up to 4, cannot swap two scores or two groups."""
    for row in logits.astype(np.float64):
        scores = 1 / (1 + np.exp(-row)) + bias
        strengths = np.sort(scores.reshape(num_groups, -1), axis=1)[:, -2:].sum(axis=1)
        for values in (scores, strengths):
            if np.diff(np.sort(values)).min(initial=1.0) < 2e-6:
                return False
    return True


def router_of(call: dict[str, Any]) -> Router:
    return Router(
        scoring=call["scoring"],
        renormalize=call["renormalize"],
        scale=call["scale"],
        bias=None if call["bias"] is None else torch.from_numpy(call["bias"]),
        num_groups=call["n_groups"] or 1,
        top_groups=call["best_groups"] or 1,
    )


def check(call: dict[str, Any]) -> None:
    """Scores rank every expert as the oracle's do; gates of those allowed are the oracle's."""
    expected = oracle.router(**call)
    logits = torch.from_numpy(call["logits"])
    before = logits.clone()
    scores, gates = router_of(call).score(logits)
    assert scores.dtype == gates.dtype == torch.float32
    assert scores.shape == gates.shape == logits.shape
    assert ranking(scores) == ranking(torch.from_numpy(expected.scores))
    assert [order[: call["k"]] for order in ranking(scores)] == expected.ids.tolist()
    assert torch.equal(scores.isneginf(), torch.from_numpy(expected.scores).isneginf())
    allowed = ~scores.isneginf()
    assert_close(gates[allowed], torch.from_numpy(expected.gates)[allowed])
    chosen = gates.gather(1, torch.from_numpy(expected.ids)).double()
    if call["renormalize"]:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    assert_close(chosen * call["scale"], torch.from_numpy(expected.weights))
    assert torch.equal(logits, before)


@thorough
@given(calls("softmax", biased=False, grouped=False))
def test_softmax_routers_score_as_the_oracle_does(call: dict[str, Any]) -> None:
    """A softmax router ranks by its logits and weighs by their softmax."""
    check(call)


@thorough
@given(calls("sigmoid", biased=False, grouped=False))
def test_sigmoid_routers_score_as_the_oracle_does(call: dict[str, Any]) -> None:
    """A sigmoid router without bias ranks by its logits and weighs by their sigmoid."""
    check(call)


@thorough
@given(calls("sigmoid", biased=True, grouped=False))
def test_a_correction_bias_ranks_and_does_not_weigh(call: dict[str, Any]) -> None:
    """With a bias, experts rank by sigmoid plus bias and weigh by the sigmoid alone."""
    check(call)


@thorough
@given(calls("softmax", biased=False, grouped=True))
def test_groups_without_bias_count_by_their_best_expert(call: dict[str, Any]) -> None:
    """A softmax router with groups excludes the groups whose best expert is not good enough."""
    check(call)


@thorough
@given(calls("sigmoid", biased=True, grouped=True))
def test_groups_with_bias_count_by_their_two_best_experts(call: dict[str, Any]) -> None:
    """A biased router with groups adds up each group's two best biased scores."""
    check(call)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_without_bias_scores_are_the_logits_themselves(scoring: Any) -> None:
    """Logits whose gates round to the same float32 still rank by the logits, on any device."""
    logits = torch.tensor([[30.0, 40.0, 35.0, -200.0, -150.0]])
    scores, _ = Router(scoring=scoring).score(logits)
    assert torch.equal(scores, logits)
    assert ranking(scores) == [[1, 2, 0, 4, 3]]


def test_sqrtsoftplus_gates_are_the_root_of_softplus() -> None:
    """The third scoring function weighs by sqrt(log(1 + exp(x)))."""
    logits = torch.tensor([[-3.0, 0.0, 2.5, 40.0]])
    _, gates = Router(scoring="sqrtsoftplus").score(logits)
    expected = [float(np.sqrt(np.log1p(np.exp(x)))) for x in (-3.0, 0.0, 2.5, 40.0)]
    assert_close(gates, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_score_as_their_float32_values(dtype: torch.dtype) -> None:
    """Half-precision logits are widened first, so they score as the same float32 numbers."""
    logits = torch.randn(3, 8).to(dtype)
    for got, wide in zip(Router().score(logits), Router().score(logits.float()), strict=True):
        assert torch.equal(got, wide)


# --- groups at their limits --------------------------------------------------------------------


def kept_groups(router: Router, logits: list[float], size: int) -> list[int]:
    scores, _ = router.score(torch.tensor([logits]))
    kept = (~scores.isneginf()).reshape(-1, size).any(dim=1)
    return [g for g, is_kept in enumerate(kept.tolist()) if is_kept]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_groups_without_bias_rank_by_their_logits(scoring: Any) -> None:
    """Groups whose best gates round to the same float32 still rank by their best logits."""
    router = Router(scoring=scoring, num_groups=4, top_groups=2)
    saturated = [30.0, 0.0, 60.0, 0.0, 40.0, 0.0, 50.0, 0.0]
    vanishing = [-130.0, -999.0, -120.0, -999.0, 0.0, -999.0, -140.0, -999.0]
    assert kept_groups(router, saturated, 2) == [1, 3]
    assert kept_groups(router, vanishing, 2) == [1, 2]


@pytest.mark.parametrize("num_groups", [4, 8, 32])
@pytest.mark.parametrize("biased", [False, True])
def test_tied_groups_go_to_the_lower_group(num_groups: int, biased: bool) -> None:
    """Where groups tie, the ones with the lower expert ids are kept, as experts tie."""
    router = Router(
        scoring="sigmoid",
        bias=torch.zeros(2 * num_groups) if biased else None,
        num_groups=num_groups,
        top_groups=3,
    )
    assert kept_groups(router, [1.0] * (2 * num_groups), 2) == [0, 1, 2]
    last_best = [1.0] * (2 * num_groups - 2) + [2.0, 2.0]
    assert kept_groups(router, last_best, 2) == [0, 1, num_groups - 1]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("base", [[0, 1], [2, 3], [4, 5], [6, 7]])
def test_experts_that_the_engine_chose_from_a_tied_group_keep_their_weight(
    base: list[int], biased: bool
) -> None:
    """The engine's choice among tied groups stands: its experts are not weighed as excluded."""
    router = Router(
        scoring="sigmoid",
        bias=torch.zeros(8) if biased else None,
        num_groups=4,
        top_groups=1,
    )
    scores, gates = router.score(torch.ones(1, 8), torch.tensor([base]))
    got = reroute(
        scores,
        gates,
        torch.tensor([base]),
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([0]),
        build_table([OEA.model_validate({"k0": 1})], layer=0, top_k=2, num_experts=8),
        renormalize=True,
    )
    assert got.topk_ids.tolist() == [[base[0], FREE]]
    assert got.topk_weights.tolist() == [[1.0, 0.0]]


def test_all_groups_allowed_excludes_nobody() -> None:
    """With every group allowed the limit changes nothing."""
    logits = torch.randn(4, 8)
    limited, plain = Router(num_groups=4, top_groups=4), Router()
    for got, expected in zip(limited.score(logits), plain.score(logits), strict=True):
        assert torch.equal(got, expected)


# --- odd logits --------------------------------------------------------------------------------

ODD = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0, -0.0, 1.0, -2.0)

ROUTERS = {
    "softmax": Router(),
    "sigmoid": Router(scoring="sigmoid"),
    "sqrtsoftplus": Router(scoring="sqrtsoftplus"),
    "bias": Router(scoring="sigmoid", bias=torch.linspace(-1, 1, 8)),
    "groups": Router(num_groups=4, top_groups=2),
    "biased groups": Router(
        scoring="sigmoid", bias=torch.linspace(-1, 1, 8), num_groups=4, top_groups=2
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=100, deadline=None, database=None)
@given(rows=st.lists(st.lists(st.sampled_from(ODD), min_size=8, max_size=8), max_size=4))
def test_no_logits_give_a_nan_or_infinite_or_negative_gate(
    name: str, rows: list[list[float]]
) -> None:
    """Gates are finite and not negative whatever comes in; a NaN logit's gate is 0."""
    logits = torch.tensor(rows).reshape(-1, 8)
    scores, gates = ROUTERS[name].score(logits)
    assert torch.isfinite(gates).all()
    assert (gates >= 0).all()
    assert not gates[logits.isnan()].any()
    assert not scores[~logits.isnan()].isnan().any()


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=100, deadline=None, database=None)
@given(row=st.lists(st.sampled_from(ODD), min_size=8, max_size=8))
def test_an_expert_with_a_nan_logit_ranks_after_every_other_that_may_be_chosen(
    name: str, row: list[float]
) -> None:
    """A NaN logit never outranks a number, bias or not."""
    scores, _ = ROUTERS[name].score(torch.tensor([row]))
    order = [j for j in ranking(scores)[0] if not scores[0, j].isneginf()]
    is_nan = [bool(np.isnan(row[j])) for j in order]
    assert is_nan == sorted(is_nan)


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_do_not_disturb_each_other(name: str) -> None:
    """A row of NaN or infinity beside a good one leaves the good one's scores and gates."""
    good = torch.linspace(-2, 2, 8)[None]
    alone = ROUTERS[name].score(good)
    for bad in (float("nan"), float("inf"), -float("inf")):
        together = ROUTERS[name].score(torch.cat((torch.full((1, 8), bad), good)))
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got[1:], expected)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bad", ODD[:3])
def test_rows_without_a_number_can_still_be_rerouted(name: str, bad: float) -> None:
    """A row of nothing but NaN or infinity ends on valid ids and numeric weights."""
    router = ROUTERS[name]
    scores, gates = router.score(torch.full((2, 8), bad))
    policies = [Vanilla(), OEA.model_validate({"k0": 1, "p": 0.5})]
    got = reroute(
        scores,
        gates,
        torch.tensor([[3, 1], [6, 2]]),
        torch.full((2, 2), 0.5),
        torch.tensor([0, 1]),
        build_table(policies, layer=0, top_k=2, num_experts=8),
        renormalize=True,
    )
    assert got.topk_ids[0].tolist() == [3, 1]
    assert all(0 <= j < 8 for j in got.topk_ids[1].tolist())
    assert torch.isfinite(got.topk_weights).all()
