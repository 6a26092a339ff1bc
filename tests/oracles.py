"""Slow, obvious re-statements of the routing rules that the tests hold the package to.

Everything here is written from the routing semantics page with plain Python loops and float64
arithmetic.  It imports nothing from the package and shares no code with it, so an error in the
package cannot hide here as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

import numpy as np

FAINTEST = -80.0
"""Logit, under softmax relative to the row's largest, below which a gate is 0."""

FREE = -1
"""Id of a slot without an expert, where it may have one of its own."""

RowPolicy = dict[str, Any]


@dataclass(frozen=True)
class Routed:
    """The answer to one MoE call: final ids and weights, the active set U, and its sizes."""

    ids: np.ndarray
    weights: np.ndarray
    active: list[int]
    distinct: int
    distinct_base: int


@dataclass(frozen=True)
class Scored:
    """What a model's router makes of logits: scores, gates, and its own choice."""

    scores: np.ndarray
    gates: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def comes_before(score_a: float, id_a: int, score_b: float, id_b: int) -> bool:
    """Say whether expert a ranks before expert b: higher score, then lower id, NaN last."""
    a_nan, b_nan = math.isnan(score_a), math.isnan(score_b)
    if a_nan != b_nan:
        return b_nan
    if not a_nan and score_a != score_b:  # 0.0 == -0.0 here, as the page wants
        return score_a > score_b
    return id_a < id_b


def in_rank_order(candidates: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Sort experts by what comes before what."""

    def compare(a: int, b: int) -> int:
        return -1 if comes_before(float(scores[a]), a, float(scores[b]), b) else int(a != b)

    return sorted(candidates, key=cmp_to_key(compare))


def rank_order(scores: Sequence[float], base: Sequence[int]) -> list[int]:
    """All experts of one row in rank order, the engine's own choice standing first."""
    rest = [j for j in range(len(scores)) if j not in base]
    return in_rank_order(base, scores) + in_rank_order(rest, scores)


def clean_gates(gates: Sequence[float]) -> list[float]:
    """The gates of one row with every NaN counted as 0."""
    return [0.0 if math.isnan(g) else float(g) for g in gates]


def mass_prefixes(gates: Sequence[float], order: Sequence[int]) -> list[float]:
    """Cumulative gate mass after 1, 2, ... experts of `order`, as a share of all experts."""
    clean = clean_gates(gates)
    total = sum(clean)
    shares: list[float] = []
    running = 0.0
    for j in order:
        running += clean[j]
        shares.append(running / total if total > 0.0 else 0.0)
    return shares


NO_LIMIT = 10**9


def numbers_of(policy: RowPolicy) -> RowPolicy:
    """The numbers of the one rule behind a policy of any kind, as its paper has them.

    `k0` and `p`: who is required. `max_active` and `exponent`: how the union is filled. `k_max` and
    `max_rank`: what a row takes, or `rho`: from where on its slots move. `c` and `mapped_share`:
    what becomes of lost weight; `c` is None for what the model would do.
    """
    numbers: RowPolicy = {
        "k0": NO_LIMIT,
        "p": 1.0,
        "max_active": 0,
        "exponent": 2,
        "k_max": NO_LIMIT,
        "max_rank": NO_LIMIT,
        "rho": None,
        "mapped_share": 0.0,
        "c": None,
    }
    kind = policy["kind"]
    given = {name: value for name, value in policy.items() if value is not None}
    if kind == "sere":
        given["k0"] = policy["S"]
    elif kind == "topk":
        given["k_max"] = policy["k0"]
    elif kind == "budget":
        given["exponent"] = 1 if policy["utility"] == "gate" else 2
    elif kind not in ("vanilla", "oea", "rule"):
        raise ValueError(f"unknown kind {kind!r}")
    return {**numbers, **given}


def keeps_base(policy: RowPolicy, k: int) -> bool:
    """Say whether the policy leaves all k of the row's experts required, which is vanilla."""
    numbers = numbers_of(policy)
    return bool(numbers["k0"] >= k and numbers["p"] >= 1.0)


def required_count(policy: RowPolicy, k: int, gates: Sequence[float], base: Sequence[int]) -> int:
    """How many of the row's base experts (in rank order) pass 1 requires."""
    numbers = numbers_of(policy)
    count = min(int(numbers["k0"]), k)
    if numbers["p"] < 1.0:
        for t, share in enumerate(mass_prefixes(gates, base), start=1):
            if share >= numbers["p"]:
                return min(count, t)
    return count


def row_demand(policy: RowPolicy, gates: Sequence[float], base: Sequence[int]) -> dict[int, int]:
    """Whole quanta, 65536 to the unit, by which a row asks for its own base experts."""
    clean = clean_gates(gates)
    total = sum(clean[j] for j in base)
    demand: dict[int, int] = {}
    for j in base:
        if total > 0.0 and clean[j] > 0.0:
            share = clean[j] / total
            utility = share ** numbers_of(policy)["exponent"]
            demand[j] = max(1, int(utility * 65536 + 0.5))
    return demand


def filled_up(union: set[int], demands: Sequence[dict[int, int]], wanted: int) -> set[int]:
    """The union and the `wanted` experts that rows ask for most; ties to the lower id."""
    total: dict[int, int] = {}
    for demand in demands:
        for j, quanta in demand.items():
            total[j] = total.get(j, 0) + quanta
    return union | set(sorted(total, key=lambda j: (-total[j], j))[:wanted])


def reroute(
    scores: np.ndarray,
    gates: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    policies: Sequence[RowPolicy | None],
    *,
    renormalize: bool,
    scale: float = 1.0,
    repeats_first: bool = False,
) -> Routed:
    """Route one MoE call; `policies[b]` is None for a padded row.

    With `repeats_first` a slot without an expert names the one in the row's first slot, and every
    slot of a padded row the lowest of U; else `FREE`. Such slots weigh nothing.
    """
    n_rows, n_experts = scores.shape
    k = topk_ids.shape[1]
    live = [b for b in range(n_rows) if policies[b] is not None]

    # Pass 1: what every live row requires.
    order: dict[int, list[int]] = {}
    required: dict[int, list[int]] = {}
    union: set[int] = set()
    demands: list[dict[int, int]] = []
    wanted = 0
    for b in live:
        policy = policies[b]
        assert policy is not None
        base = [int(j) for j in topk_ids[b]]
        order[b] = rank_order([float(s) for s in scores[b]], base)
        m = required_count(policy, k, [float(g) for g in gates[b]], order[b][:k])
        required[b] = order[b][:m]
        for j in required[b]:
            union.add(j)
        max_active = int(numbers_of(policy)["max_active"])
        if max_active and not keeps_base(policy, k):
            demands.append(row_demand(policy, [float(g) for g in gates[b]], order[b][:k]))
            wanted = max(wanted, max_active)
    union = filled_up(union, demands, wanted)
    active = sorted(union)

    # Pass 2: every row on its own, given the active set.
    ids = np.zeros((n_rows, k), dtype=np.int64)
    weights = np.zeros((n_rows, k), dtype=np.float64)
    for b in range(n_rows):
        policy = policies[b]
        if policy is None:
            for t in range(k):
                ids[b, t] = FREE if not repeats_first else active[0] if active else 0
                weights[b, t] = 0.0
            continue
        if keeps_base(policy, k):
            for t in range(k):
                ids[b, t] = topk_ids[b, t]
                weights[b, t] = float(topk_weights[b, t])
            continue
        numbers = numbers_of(policy)
        cut = min(numbers["k_max"], numbers["max_rank"]) < k
        whole = sorted(topk_ids[b].tolist()) == sorted(order[b][:k])  # each there, and once
        if (
            whole
            and union.issuperset(topk_ids[b].tolist())
            and (numbers["rho"] is not None or not cut)
        ):
            ids[b], weights[b] = topk_ids[b], topk_weights[b]
            continue
        if numbers["rho"] is not None:
            slots, factors = [], []
            for j in topk_ids[b]:
                u = int(j) if 0 <= j < n_experts else order[b][0]
                v = _stand_in(u, numbers, active)
                slots.append(v)
                factors.append(1.0 if v == u else _moved_share(u, v, numbers))
            ids[b], weights[b] = _one_slot_each(slots, topk_weights[b] * factors, repeats_first)
            continue
        chosen = list(required[b])
        k_max = min(int(numbers["k_max"]), k)
        max_rank = min(int(numbers["max_rank"]), n_experts)
        for rank in range(len(required[b]) + 1, max_rank + 1):  # ranks count from 1
            if len(chosen) >= k_max:
                break
            j = order[b][rank - 1]
            if j in union:
                chosen.append(j)
        clean = clean_gates([float(g) for g in gates[b]])
        chosen_sum = sum(clean[j] for j in chosen)
        if chosen_sum == 0.0:  # no weight is left: the row keeps what it came with
            ids[b], weights[b] = topk_ids[b], topk_weights[b]
            continue
        wanted = sum(float(w) for w in topk_weights[b])
        if numbers["c"] is not None:
            base_sum = sum(clean[j] for j in order[b][:k])
            kept = sum(clean[j] for j in order[b][:k] if j in chosen)
            kept = kept / base_sum if base_sum > 0.0 else 1.0
            wanted *= kept + float(np.float32(numbers["c"])) * (1.0 - kept)
        for t in range(k):
            if t < len(chosen):
                j = chosen[t]
                ids[b, t] = j
                if renormalize or numbers["c"] is not None:
                    weights[b, t] = clean[j] / chosen_sum * wanted
                else:
                    weights[b, t] = clean[j] * scale
            else:
                ids[b, t] = chosen[0] if repeats_first else FREE
                weights[b, t] = 0.0
        share = float(np.float32(numbers["mapped_share"]))
        if share > 0.0:
            base_weights = dict(zip(topk_ids[b].tolist(), topk_weights[b].tolist(), strict=True))
            mapped = _mapped(base_weights, policy, chosen)
            for t, j in enumerate(chosen):
                weights[b, t] = (1.0 - share) * weights[b, t] + share * mapped[j]

    final: set[int] = set()
    original: set[int] = set()
    for b in live:
        for t in range(k):
            if ids[b, t] != FREE:
                final.add(int(ids[b, t]))
            original.add(int(topk_ids[b, t]))
    return Routed(ids, weights, active, len(final), len(original))


def _stand_in(u: int, numbers: RowPolicy, active: list[int]) -> int:
    """The expert that runs in place of u for a row whose slots move."""
    if u in active:
        return u
    sim = np.asarray(numbers["sim"], dtype=np.float32)
    if not active:
        return u
    best = active[0]
    for v in active:  # ascending, so an equal later value does not win
        if sim[u, v] > sim[u, best]:
            best = v
    return best if sim[u, best] >= np.float32(numbers["rho"]) else u


def _moved_share(u: int, v: int, numbers: RowPolicy) -> float:
    """What a slot of u weighs on v, of what it weighed on u."""
    if numbers["c"] is not None:
        return float(np.float32(numbers["c"]))
    coefficients = numbers.get("coefficients")
    return 1.0 if coefficients is None else float(np.float32(coefficients[u][v]))


def _one_slot_each(
    slots: Sequence[int], weights: np.ndarray, repeats_first: bool
) -> tuple[list[int], list[float]]:
    """An expert's first slot takes the sum of its slots; the others are free."""
    ids, sums = list(slots), [float(w) for w in weights]
    for t, j in enumerate(slots):
        first = slots.index(j)
        if first < t:
            sums[first] += sums[t]
            ids[t], sums[t] = slots[0] if repeats_first else FREE, 0.0
    return ids, sums


def _mapped(
    base_weights: dict[int, float], policy: RowPolicy, chosen: Sequence[int]
) -> dict[int, float]:
    """The row's own weights, each on its expert or on the most similar of the `chosen`."""
    sim = np.asarray(policy["sim"], dtype=np.float32)
    mapped = dict.fromkeys(chosen, 0.0)
    for u, weight in base_weights.items():
        target = u if u in mapped else min(chosen, key=lambda v: (-float(sim[u, v]), v))
        mapped[target] += weight
    return mapped


def softmax_row(logits: Sequence[float]) -> list[float]:
    """Softmax of one row of finite logits in float64."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    total = sum(powers)
    return [
        power / total if np.float32(x) - np.float32(top) >= FAINTEST else 0.0
        for x, power in zip(logits, powers, strict=True)
    ]


def sigmoid(x: float) -> float:
    """The logistic function in float64 without overflow."""
    if x < FAINTEST:
        return 0.0
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def router(
    logits: np.ndarray,
    k: int,
    *,
    scoring: str = "softmax",
    bias: np.ndarray | None = None,
    n_groups: int | None = None,
    best_groups: int | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Scored:
    """A model's router on finite logits: softmax or sigmoid, optional bias and group limit.

    The correction bias takes part in choosing, never in the weights.  With a group limit only
    the experts of the best groups may be chosen: a group counts by its best score when there is
    no bias and by the sum of its two best biased scores when there is one.  The others score
    -inf; their gate is what they would weigh, though the model never chooses them.
    """
    n_rows, n_experts = logits.shape
    scores = np.zeros((n_rows, n_experts), dtype=np.float64)
    gates = np.zeros((n_rows, n_experts), dtype=np.float64)
    ids = np.zeros((n_rows, k), dtype=np.int64)
    weights = np.zeros((n_rows, k), dtype=np.float64)
    for b in range(n_rows):
        row = [float(x) for x in logits[b]]
        gate = softmax_row(row) if scoring == "softmax" else [sigmoid(x) for x in row]
        score = list(row)  # both maps are monotone, so the logits rank the experts exactly
        if bias is not None:
            score = [gate[j] + float(bias[j]) for j in range(n_experts)]
        if n_groups is not None and best_groups is not None:
            size = n_experts // n_groups
            group_score: list[float] = []
            for g in range(n_groups):
                members = sorted(score[g * size : (g + 1) * size], reverse=True)
                group_score.append(members[0] if bias is None else sum(members[:2]))
            kept = in_rank_order(list(range(n_groups)), group_score)[:best_groups]
            for j in range(n_experts):
                if j // size not in kept:
                    score[j] = -math.inf
        chosen = in_rank_order(list(range(n_experts)), score)[:k]
        total = sum(gate[j] for j in chosen)
        for j in range(n_experts):
            scores[b, j] = score[j]
            gates[b, j] = gate[j]
        for t, j in enumerate(chosen):
            ids[b, t] = j
            weight = gate[j] / total if renormalize else gate[j]
            weights[b, t] = weight * scale
    return Scored(scores, gates, ids, weights)
