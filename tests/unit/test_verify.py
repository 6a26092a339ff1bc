"""What the demo's check of recorded calls lets pass and what it reports."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_moe_routing.bench.verify import Verdict, verify_calls
from sglang_moe_routing.policies import OEA, SERE, TopK, Vanilla

POLICIES = {
    "vanilla": Vanilla(),
    "topk": TopK.model_validate({"k0": 1}),
    "oea": OEA.model_validate({"k0": 1}),
    "sere": SERE.model_validate({"num_primary": 1}),
}
# Experts 2 and 3, which nobody requires, resemble expert 0 most.
SIMILARITY = {0: [[1, 0, 0, 0], [0, 1, 0, 0], [0.9, 0.1, 1, 0], [0.8, 0.2, 0, 1]]}


def verify(policy: str, ids: list[int], weights: list[float]) -> Verdict:
    """One call of a vanilla row that loads 0 and 1, and of a row under `policy` that chose
    2, 3 and 0, in which 0 ranks first."""
    call = {
        "layer": 0,
        "rows": ["vanilla", policy],
        "router_logits": [[3.0, 2.0, 0.0, 1.0], [3.0, 0.0, 2.0, 1.0]],
        "base_ids": [[0, 1, 3], [2, 3, 0]],
        "base_weights": [[0.5, 0.25, 0.25], [0.25, 0.125, 0.625]],
        "final_ids": [[0, 1, 3], ids],
        "final_weights": [[0.5, 0.25, 0.25], weights],
    }
    return verify_calls([call], POLICIES, SIMILARITY)


@pytest.mark.parametrize(
    ("policy", "ids", "weights"),
    [
        ("topk", [0, -1, -1], [1.0, 0.0, 0.0]),
        ("topk", [0, 0, 0], [1.0, 0.0, 0.0]),
        ("oea", [0, 3, 1], [0.7, 0.2, 0.1]),
        ("sere", [0, 3, -1], [0.875, 0.125, 0.0]),
        ("sere", [0, 3, 0], [0.875, 0.125, 0.0]),
    ],
)
def test_a_row_that_obeys_its_policy_passes(
    policy: str, ids: list[int], weights: list[float]
) -> None:
    assert verify(policy, ids, weights).ok


@pytest.mark.parametrize(
    ("policy", "ids", "weights", "what"),
    [
        ("topk", [2, -1, -1], [1.0, 0.0, 0.0], "runs [2], expected [0]"),
        ("topk", [0, -1, -1], [0.9, 0.0, 0.0], "weights sum to 0.9"),
        ("sere", [0, 3, -1], [0.625, 0.125, 0.25], "expert 0 weighs 0.625, expected 0.875"),
        ("sere", [2, 3, 0], [0.25, 0.125, 0.625], "runs [0, 2, 3], expected [0, 3]"),
    ],
)
def test_a_row_that_breaks_its_policy_is_reported(
    policy: str, ids: list[int], weights: list[float], what: str
) -> None:
    verdict = verify(policy, ids, weights)
    assert what in verdict.violations[0]
    assert not verdict.ok


@pytest.mark.parametrize("weights", [[0.25, 0.125, 0.625], [0.875, 0.125, 0.0]])
def test_slots_that_name_an_expert_again_are_counted_unless_free(weights: list[float]) -> None:
    verdict = verify("sere", [0, 3, 0], weights)
    assert verdict.repeated_experts == int(weights[2] > 0)


def test_a_row_that_may_use_no_expert_with_weight_must_be_untouched() -> None:
    call: dict[str, Any] = {
        "layer": 0,
        "rows": ["topk"],
        "router_logits": [[0.0, -90.0, -100.0]],
        "base_ids": [[2, 1]],
        "base_weights": [[0.5, 0.5]],
        "final_ids": [[2, 1]],
        "final_weights": [[0.5, 0.5]],
    }
    assert verify_calls([call], POLICIES, {}).ok
    changed = {**call, "final_ids": [[1, -1]], "final_weights": [[1.0, 0.0]]}
    assert "has weight" in verify_calls([changed], POLICIES, {}).violations[0]
