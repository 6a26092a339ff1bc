"""Recorded MoE calls, held to the oracle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckError
from . import oracle

Call = Mapping[str, Any]

SCORE_RTOL = 1e-6
"""Scores that are closer count as tied, and the engine decides ties: float32 rounding."""

WEIGHT_RTOL, WEIGHT_ATOL = 1e-5, 1e-7
"""Float32 exponentials, a division and a sum of at most 32 terms, against float64."""

DEMAND_RTOL = 2e-5
"""Of an expert's worth to a row: 3e-6 for a gate and for the sum of gates, twice for a square."""

MASS_ATOL = 1e-6
"""Of a share of the gate mass, which is compared with `p`."""


@dataclass(frozen=True)
class Checked:
    """What `check_calls` found in order.

    Attributes:
        num_calls: MoE calls.
        rows: rows that are not padding, by the name of their policy.
        active_experts: mean of the distinct experts that the rows of a call ran (T).
        active_experts_base: the same of what the router had chosen.
    """

    num_calls: int
    rows: Mapping[str, int]
    active_experts: float
    active_experts_base: float


def read_records(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every MoE call that the recorder (``SGLANG_MOE_ROUTING_RECORD``) wrote to `folder`.

    Yields:
        For each call ``layer``, ``phase`` (SGLang's forward mode, or GRAPH) and ``requests`` (id of
        each row's request, None in a graph); ``rows`` (name of each row's policy, None if padded)
        and ``rules`` (what its policy is on this layer at this number of live rows: the `Rule`'s
        numbers that differ from vanilla's, with the digest of a similarity artifact);
        ``router_logits``; ``base_ids`` and ``base_weights``, which the router chose, ``final_ids``
        and ``final_weights``, which ran; ``union``; and of its process ``pid``, ``router`` and
        ``similarity`` (by digest, ``similarity`` and ``coefficients`` of this layer).
    """
    for path in sorted(Path(folder).glob("calls-*.jsonl")):
        matrices: dict[int, dict[str, Any]] = {}
        with path.open() as file:
            header = json.loads(file.readline())
            for line in file:
                entry = json.loads(line)
                layer = entry["layer"]
                if "artifact" in entry:
                    matrices.setdefault(layer, {})[entry["artifact"]] = entry["matrices"]
                    continue
                yield {
                    **entry,
                    "pid": header["pid"],
                    "router": header["layers"][str(layer)],
                    "similarity": matrices.get(layer, {}),
                }


def check_calls(records: Iterable[Call]) -> Checked:
    """Hold every recorded call to the `oracle`, by the rules that it was recorded with.

    The router's choice must be that of its logits, where scores are not tied to `SCORE_RTOL`.
    Vanilla rows must have kept it bit for bit. All others must have the oracle's experts exactly,
    and its weights to `WEIGHT_RTOL`; padded rows none. The union must be the oracle's. What float32
    cannot tell apart may be either way: experts whose demand differs by less than `DEMAND_RTOL`,
    and a gate mass within `MASS_ATOL` of `p`.

    That the rules are those of the config is not checked here: compare ``rules`` with what you
    know. Rows of a policy in torch have none, and a call with one cannot be checked.

    Args:
        records: from `read_records`.

    Raises:
        CheckError: a call is not what its rules say. Names call, layer, row, expected and found.
    """
    rows: Counter[str] = Counter()
    active, num_calls = np.zeros(2), 0
    for call in records:
        try:
            active += check_call(call)
        except CheckError as error:
            place = f"call {num_calls}, layer {call['layer']}, {call['phase']}"
            raise CheckError(f"{place}: {error}") from None
        num_calls += 1
        rows.update(name for name in call["rows"] if name is not None)
    final, base = active / max(num_calls, 1)
    return Checked(num_calls, dict(rows), float(final), float(base))


def check_call(call: Call, *, is_routers: bool = True) -> tuple[int, int]:
    """Hold one call to the oracle; distinct experts of its live rows, now and before.

    Args:
        is_routers: whether the choice is the router's, and not just any.
    """
    _check_form(call)
    scored = _score(call)
    base_ids = np.array(call["base_ids"], dtype=np.int64).reshape(-1, call["router"]["top_k"])
    if is_routers:
        for b, name in enumerate(call["rows"]):
            if name is not None:
                _check_base(call, scored, b)
    allowed = ~np.isneginf(scored.scores)
    np.put_along_axis(allowed, base_ids, True, axis=1)  # what the engine chose is not excluded
    scored.gates[~allowed] = 0.0  # an expert of another group weighs nothing
    rules = [_rule(call, b) for b in range(len(call["rows"]))]
    try:
        return _check_rows(call, scored, base_ids, rules)
    except CheckError:
        for nudge in (-MASS_ATOL, MASS_ATOL):
            nudged = [r and {**r, "p": r["p"] + nudge} if r and "p" in r else r for r in rules]
            if nudged != rules:
                try:
                    return _check_rows(call, scored, base_ids, nudged)
                except CheckError:
                    pass
        raise


def _check_form(call: Call) -> None:
    """What is there for one row is there for each; only padded rows have neither name nor rule."""
    parts = ("rules", "router_logits", "base_ids", "base_weights", "final_ids", "final_weights")
    for part in parts:
        if len(call[part]) != len(call["rows"]):
            raise CheckError(f"{part} of {len(call[part])} rows, expected {len(call['rows'])}")
    for b, (name, rule) in enumerate(zip(call["rows"], call["rules"], strict=True)):
        if (name is None) != (rule is None):
            raise CheckError(f"{_row(call, b)}: has the rule {rule}")


def _score(call: Call) -> oracle.Scored:
    """What the model's router makes of the recorded logits, by the oracle."""
    router = call["router"]
    has_groups = router["num_groups"] > 1
    return oracle.router(
        np.array(call["router_logits"], dtype=np.float32).reshape(-1, router["num_experts"]),
        router["top_k"],
        scoring=router["scoring"],
        bias=None if router["bias"] is None else np.array(router["bias"], dtype=np.float32),
        n_groups=router["num_groups"] if has_groups else None,
        best_groups=router["top_groups"] if has_groups else None,
        renormalize=router["renormalize"],
        scale=router["scale"],
    )


def _rule(call: Call, b: int) -> dict[str, Any] | None:
    """The rule of a row, for the oracle."""
    rule = call["rules"][b]
    if rule is None:
        return None
    if "torch" in rule:
        raise CheckError(
            f"{_row(call, b)}: its policy is written in torch (kind {rule['torch']}), and no rule "
            "says which experts it should have"
        )
    matrices = call["similarity"][rule["similarity"]] if "similarity" in rule else {}
    return {**rule, **matrices}


def _row(call: Call, b: int) -> str:
    name = call["rows"][b]
    return f"row {b} (padding)" if name is None else f"row {b} ({name})"


def _check_base(call: Call, scored: oracle.Scored, b: int) -> None:
    """Hold the engine's own choice for a row to the router."""
    router, ids, scores = call["router"], call["base_ids"][b], scored.scores[b]
    expected = scored.ids[b].tolist()
    if set(ids) != set(expected):
        left_out = max(scores[j] for j in range(len(scores)) if j not in ids)
        slack = SCORE_RTOL * max(1.0, abs(left_out))
        if len(set(ids)) < len(expected) or min(scores[ids]) < left_out - slack:
            raise CheckError(f"{_row(call, b)}: the router chose {ids}, expected {expected}")
    gates = scored.gates[b][ids]
    weights = gates / gates.sum() if router["renormalize"] else gates
    _check_weights(call, b, "base_weights", weights * router["scale"])


def _check_rows(
    call: Call, scored: oracle.Scored, base_ids: np.ndarray, rules: list[dict[str, Any] | None]
) -> tuple[int, int]:
    router, found = call["router"], call["union"]
    base_weights = np.array(call["base_weights"], dtype=np.float32).reshape(base_ids.shape)
    given = scored.scores, scored.gates, base_ids, base_weights, rules
    rows = [*oracle.rows_of(*given).values()]
    if not oracle.may_be_union(found, rows, DEMAND_RTOL):
        raise CheckError(f"the union is {found}, expected {sorted(oracle.union_of(rows))}")
    expected = oracle.reroute(
        *given,
        renormalize=router["renormalize"],
        scale=router["scale"],
        repeats_first=router["free_slots"] == "repeat_first",
        union=found,
    )
    for b, rule in enumerate(rules):
        ids, wanted = call["final_ids"][b], expected.ids[b].tolist()
        if ids != wanted:
            raise CheckError(f"{_row(call, b)}: has the experts {ids}, expected {wanted}")
        if rule is not None and oracle.keeps_base(rule, router["top_k"]):
            weights, before = call["final_weights"][b], call["base_weights"][b]
            if np.float32(weights).tobytes() != np.float32(before).tobytes():
                raise CheckError(f"{_row(call, b)}: weighs {weights}, expected {before} unchanged")
        if rule is None and any(call["final_weights"][b]):
            raise CheckError(
                f"{_row(call, b)}: weighs {call['final_weights'][b]}, expected nothing"
            )
        _check_weights(call, b, "final_weights", expected.weights[b])
    return expected.distinct, expected.distinct_base


def _check_weights(call: Call, b: int, name: str, expected: np.ndarray) -> None:
    found = call[name][b]
    if not np.allclose(found, expected, WEIGHT_RTOL, WEIGHT_ATOL, equal_nan=True):
        raise CheckError(f"{_row(call, b)}: {name} {found}, expected {expected.tolist()}")
