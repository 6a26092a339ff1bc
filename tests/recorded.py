"""Hold recorded MoE calls to the oracles: the model's router first, then the routing rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests import oracles

SLACK = 1e-6
"""Relative rounding of float32 scores: closer ones count as tied, and the engine decides ties."""

WEIGHTS = {"rtol": 1e-5, "atol": 1e-7}
"""Float32 exponentials, a division and a sum of at most 16 terms against float64."""


def check_call(
    call: Mapping[str, Any],
    policies: Mapping[str, Mapping[str, Any]],
    similarity: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Assert that one recorded call is what the oracles make of its router logits.

    The engine's base choice must be the model's router's, up to ties; vanilla rows must keep it
    bit for bit; every other row must have the oracle's ids exactly and its weights closely; the
    active experts must be those of the oracle's union; padded rows must add none.

    Args:
        call: from `read_records`, of a softmax or sigmoid router.
        policies: what each policy name is in this call, for `oracles.reroute`.
        similarity: matrices by layer, for policies that need some and bring none of their own
            under "similarity".
    """
    where = f"layer {call['layer']}, {call['phase']}"
    router = call["router"]
    scored = score(call)
    base_ids = np.array(call["base_ids"])
    base_weights = np.array(call["base_weights"], dtype=np.float32)
    live = [b for b, name in enumerate(call["rows"]) if name is not None]
    for b in live:
        check_base(scored, b, base_ids[b], base_weights[b], router, f"{where}, row {b}")

    expected = oracles.reroute(
        scored.scores,
        allowed_gates(scored, base_ids),
        base_ids,
        base_weights,
        [_describe(name, policies, similarity, call["layer"]) for name in call["rows"]],
        renormalize=router["renormalize"],
        scale=router["scale"],
        repeats_first=router["free_slots"] == "repeat_first",
    )
    assert call["union"] == expected.active, where
    final_ids = np.array(call["final_ids"])
    final_weights = np.array(call["final_weights"], dtype=np.float32)
    for b, name in enumerate(call["rows"]):
        row = f"{where}, row {b} ({name})"
        assert final_ids[b].tolist() == expected.ids[b].tolist(), row
        if name is None:
            assert not final_weights[b].any(), row
            continue
        if name == "vanilla":
            assert final_ids[b].tobytes() == base_ids[b].tobytes(), row
            assert final_weights[b].tobytes() == base_weights[b].tobytes(), row
        np.testing.assert_allclose(
            final_weights[b], expected.weights[b], err_msg=f"weights of {row}", **WEIGHTS
        )
    final = {int(j) for b in live for j in final_ids[b]} - {oracles.FREE}
    assert len(final) == expected.distinct <= expected.distinct_base, where


def score(call: Mapping[str, Any]) -> oracles.Scored:
    """What the model's router makes of the recorded logits, by the oracle."""
    router = call["router"]
    assert router["scoring"] in ("softmax", "sigmoid"), "the oracle knows no other scoring"
    has_groups = router["num_groups"] > 1
    return oracles.router(
        np.array(call["router_logits"], dtype=np.float32),
        router["top_k"],
        scoring=router["scoring"],
        bias=None if router["bias"] is None else np.array(router["bias"], dtype=np.float32),
        n_groups=router["num_groups"] if has_groups else None,
        best_groups=router["top_groups"] if has_groups else None,
        renormalize=router["renormalize"],
        scale=router["scale"],
    )


def check_base(
    scored: oracles.Scored,
    b: int,
    ids: np.ndarray,
    weights: np.ndarray,
    router: Mapping[str, Any],
    where: str,
) -> None:
    """Assert that the engine's own choice for row `b` is the router's."""
    assert len(set(ids.tolist())) == router["top_k"], where
    if set(ids.tolist()) != set(scored.ids[b].tolist()):
        left_out = np.delete(scored.scores[b], ids)
        slack = SLACK * max(1.0, float(np.abs(left_out.max())))
        assert scored.scores[b][ids].min() >= left_out.max() - slack, where
    gates = scored.gates[b][ids]
    expected = gates / gates.sum() if router["renormalize"] else gates
    np.testing.assert_allclose(
        weights, expected * router["scale"], err_msg=f"base weights of {where}", **WEIGHTS
    )


def allowed_gates(scored: oracles.Scored, base_ids: np.ndarray) -> np.ndarray:
    """Gates by which rows are weighed: an expert of an excluded group weighs nothing."""
    allowed = ~np.isneginf(scored.scores)
    np.put_along_axis(allowed, base_ids, True, axis=1)  # what the engine chose is not excluded
    return np.where(allowed, scored.gates, 0.0)


def _describe(
    name: str | None,
    policies: Mapping[str, Mapping[str, Any]],
    similarity: Mapping[int, np.ndarray] | None,
    layer: int,
) -> dict[str, Any] | None:
    if name is None:
        return None
    policy = dict(policies[name])
    if policy["kind"] == "sere" or policy.get("mapped_share", 0.0) > 0.0:
        source = policy.pop("similarity", similarity)
        assert source is not None, f"{name} needs similarity matrices"
        policy["sim"] = source[layer]
    return policy
