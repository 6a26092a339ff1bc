"""The oracle: the routing rules once more, slow and obvious, to hold faster code to.

Written from the papers (SERE, arXiv 2602.07616; OEA, arXiv 2511.02237; XShare, arXiv 2602.07265)
and docs/concepts.md alone, with plain loops and float64. It shares no code with the package, so
that an error in the package cannot hide here as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

import numpy as np

FAINTEST = -80.0
"""Logit, under softmax relative to the row's largest, below which a gate is 0."""

FREE = -1
"""Id of a slot without an expert, where it may have one of its own."""

NO_LIMIT = 10**9

Numbers = Mapping[str, Any]
"""What is not `NOTHING` of a rule, by the names there."""

NOTHING: Numbers = {
    "k0": NO_LIMIT,
    "p": 1.0,
    "max_active": 0,
    "exponent": 2,
    "k_max": NO_LIMIT,
    "max_rank": NO_LIMIT,
    "threshold": None,
    "mapped_share": 0.0,
    "compensation": None,
    "similarity": None,
    "coefficients": None,
}
"""The numbers of a rule under which rows stay as the model routes them.

`k0`, `p`: which of its experts a row requires. `max_active`, `exponent`: how the union is filled.
`k_max`, `max_rank`: what a row takes; or `threshold`: from which similarity on its slots move.
`compensation`, `mapped_share`: what becomes of lost weight; a compensation of None is what the
model would do. `similarity`, `coefficients`: float ``[num_experts, num_experts]``, for the rules
that use them.
"""


@dataclass(frozen=True)
class Routed:
    """The answer to one MoE call.

    Attributes:
        ids: int64 ``[num_tokens, top_k]``.
        weights: float64 ``[num_tokens, top_k]``.
        active: the union U, ascending.
        distinct, distinct_base: experts of the live rows, now and as the router had chosen.
    """

    ids: np.ndarray
    weights: np.ndarray
    active: list[int]
    distinct: int
    distinct_base: int


@dataclass(frozen=True)
class Scored:
    """What a model's router makes of logits.

    Attributes:
        scores, gates: float64 ``[num_tokens, num_experts]``, what it ranks by and weighs with.
        ids: int64 ``[num_tokens, top_k]``, its choice in rank order.
        weights: float64 ``[num_tokens, top_k]``.
    """

    scores: np.ndarray
    gates: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def comes_before(score_a: float, id_a: int, score_b: float, id_b: int) -> bool:
    """Say whether expert a ranks before expert b: higher score, then lower id, NaN last."""
    a_nan, b_nan = math.isnan(score_a), math.isnan(score_b)
    if a_nan != b_nan:
        return b_nan
    if not a_nan and score_a != score_b:  # 0.0 == -0.0
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


def keeps_base(rule: Numbers, k: int) -> bool:
    """Say whether the rule leaves all k of the row's experts required, which is vanilla."""
    numbers = {**NOTHING, **rule}
    return bool(numbers["k0"] >= k and numbers["p"] >= 1.0)


class Row:
    """One live row of a call, with its rule."""

    def __init__(
        self, scores: np.ndarray, gates: np.ndarray, ids: np.ndarray, weights: np.ndarray, rule: Any
    ) -> None:
        unknown = rule.keys() - NOTHING.keys()
        if unknown:
            raise ValueError(f"no numbers of a rule: {', '.join(unknown)}")
        self.rule = {**NOTHING, **rule}
        self.ids = [int(j) for j in ids]
        self.weights = [float(w) for w in weights]
        self.k = len(self.ids)
        self.gates = clean_gates([float(g) for g in gates])
        self.order = rank_order([float(s) for s in scores], self.ids)
        self.base = self.order[: self.k]
        self.is_vanilla = keeps_base(rule, self.k)
        self.required = self.base[: self._num_required()]

    def _num_required(self) -> int:
        count = min(int(self.rule["k0"]), self.k)
        if self.rule["p"] < 1.0:
            for t, share in enumerate(mass_prefixes(self.gates, self.base), start=1):
                if share >= self.rule["p"]:
                    return min(count, t)
        return count

    @property
    def max_active(self) -> int:
        return 0 if self.is_vanilla else int(self.rule["max_active"])

    def demand(self, factor: float) -> dict[int, int]:
        """Whole quanta, 65536 to the unit, by which the row asks for its own base experts.

        Args:
            factor: on every utility, for bounds of what rounding does; else 1.
        """
        total = sum(self.gates[j] for j in self.base)
        demand: dict[int, int] = {}
        for j in self.base:
            if total > 0.0 and self.gates[j] > 0.0:
                share = self.gates[j] / total
                utility = share ** self.rule["exponent"] * factor
                demand[j] = max(1, int(utility * 65536 + 0.5))
        return demand


def required_union(rows: Sequence[Row]) -> set[int]:
    """What the rows require, all together."""
    return {j for row in rows for j in row.required}


def total_demand(rows: Sequence[Row], factor: float = 1.0) -> dict[int, int]:
    """Quanta by which the rows ask for experts, all together; see `Row.demand`."""
    total: dict[int, int] = {}
    for row in rows:
        if row.max_active:
            for j, quanta in row.demand(factor).items():
                total[j] = total.get(j, 0) + quanta
    return total


def union_of(rows: Sequence[Row]) -> set[int]:
    """What is loaded: what rows require, and what they ask for most; ties to the lower id."""
    total = total_demand(rows)
    wanted = max((row.max_active for row in rows), default=0)
    return required_union(rows) | set(sorted(total, key=lambda j: (-total[j], j))[:wanted])


def may_be_union(found: Collection[int], rows: Sequence[Row], rtol: float) -> bool:
    """Say whether `found` is the union of `rows` if each utility may be off by `rtol`.

    Experts whose demands are closer than that may rank either way.
    """
    found, required = set(found), required_union(rows)
    wanted = max((row.max_active for row in rows), default=0)
    least, most = total_demand(rows, 1.0 - rtol), total_demand(rows, 1.0 + rtol)
    wanted = min(wanted, len(most))
    certain, possible = set(), set()
    for j in most:
        if sum((most[i], -i) > (least[j], -j) for i in most if i != j) < wanted:
            certain.add(j)
        if sum((least[i], -i) > (most[j], -j) for i in most if i != j) < wanted:
            possible.add(j)
    is_full = len(certain | (found - required)) <= wanted <= len(found & possible)
    return is_full and required | certain <= found <= required | possible


def reroute(
    scores: np.ndarray,
    gates: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    rules: Sequence[Numbers | None],
    *,
    renormalize: bool,
    scale: float = 1.0,
    repeats_first: bool = False,
    union: Collection[int] | None = None,
) -> Routed:
    """Route one MoE call.

    Args:
        scores: ``[num_tokens, num_experts]``, what the router ranks by.
        gates: ``[num_tokens, num_experts]``, combine weights before normalisation.
        topk_ids, topk_weights: ``[num_tokens, top_k]``, the router's choice.
        rules: one per row; None for a padded row.
        renormalize: whether the model normalises over the chosen experts.
        scale: factor on raw gates where it does not.
        repeats_first: a slot without an expert names the one in the row's first slot, and every
            slot of a padded row the lowest of U; else `FREE`. Such slots weigh nothing.
        union: U, where it is known; else that of the rows.
    """
    num_rows, k = topk_ids.shape
    rows = rows_of(scores, gates, topk_ids, topk_weights, rules)
    active = sorted(union_of([*rows.values()]) if union is None else union)
    padding = FREE if not repeats_first else active[0] if active else 0
    ids = np.full((num_rows, k), padding, dtype=np.int64)
    weights = np.zeros((num_rows, k), dtype=np.float64)
    final: set[int] = set()
    for b, row in rows.items():
        if row.is_vanilla or _stays_whole(row, active):
            ids[b], weights[b] = topk_ids[b], topk_weights[b]
        else:
            settle = _take if row.rule["threshold"] is None else _move
            ids[b], weights[b] = settle(row, active, renormalize, scale, repeats_first)
        final.update(ids[b].tolist())
    original = {j for row in rows.values() for j in row.ids}
    return Routed(ids, weights, active, len(final - {FREE}), len(original))


def rows_of(
    scores: np.ndarray,
    gates: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    rules: Sequence[Numbers | None],
) -> dict[int, Row]:
    """The live rows of a call, by their place; arguments as of `reroute`."""
    return {
        b: Row(scores[b], gates[b], topk_ids[b], topk_weights[b], rule)
        for b, rule in enumerate(rules)
        if rule is not None
    }


def _stays_whole(row: Row, active: Sequence[int]) -> bool:
    """Whether all of the row's own experts are loaded, and nothing cuts it."""
    is_cut = min(row.rule["k_max"], row.rule["max_rank"]) < row.k
    each_is_there_once = sorted(row.ids) == sorted(row.base)
    is_loaded = each_is_there_once and set(active).issuperset(row.ids)
    return is_loaded and (row.rule["threshold"] is not None or not is_cut)


Slots = tuple[list[int], list[float]]
"""Ids and weights of a row."""


def _take(
    row: Row, active: Sequence[int], renormalize: bool, scale: float, repeats_first: bool
) -> Slots:
    """A row that takes the best loaded experts in its own order."""
    rule, gates = row.rule, row.gates
    chosen = list(row.required)
    most = min(int(rule["k_max"]), row.k)
    for j in row.order[len(row.required) : int(rule["max_rank"])]:
        if len(chosen) < most and j in active:
            chosen.append(j)
    chosen_sum = sum(gates[j] for j in chosen)
    if chosen_sum == 0.0:  # no weight is left: the row keeps what it came with
        return row.ids, row.weights
    wanted = sum(row.weights)
    if rule["compensation"] is not None:
        base_sum = sum(gates[j] for j in row.base)
        kept = sum(gates[j] for j in row.base if j in chosen)
        kept = kept / base_sum if base_sum > 0.0 else 1.0
        wanted *= kept + float(np.float32(rule["compensation"])) * (1.0 - kept)
    if renormalize or rule["compensation"] is not None:
        weights = [gates[j] / chosen_sum * wanted for j in chosen]
    else:
        weights = [gates[j] * scale for j in chosen]
    share = float(np.float32(rule["mapped_share"]))
    if share > 0.0:
        mapped = _mapped(row, chosen)
        weights = [
            (1.0 - share) * w + share * mapped[j] for w, j in zip(weights, chosen, strict=True)
        ]
    num_free = row.k - len(chosen)
    free = chosen[0] if repeats_first else FREE
    return chosen + [free] * num_free, weights + [0.0] * num_free


def _mapped(row: Row, chosen: Sequence[int]) -> dict[int, float]:
    """The row's own weights, each on its expert or on the most similar of the `chosen`."""
    similarity = np.asarray(row.rule["similarity"], dtype=np.float32)
    mapped = dict.fromkeys(chosen, 0.0)
    for u, weight in dict(zip(row.ids, row.weights, strict=True)).items():
        target = u if u in mapped else min(chosen, key=lambda v: (-float(similarity[u, v]), v))
        mapped[target] += weight
    return mapped


def _move(
    row: Row, active: Sequence[int], renormalize: bool, scale: float, repeats_first: bool
) -> Slots:
    """A row whose slots move to stand-ins; an expert's first slot takes the sum of its slots."""
    slots, weights = [], []
    for j, weight in zip(row.ids, row.weights, strict=True):
        u = j if 0 <= j < len(row.order) else row.order[0]
        v = _stand_in(u, row.rule, active)
        slots.append(v)
        weights.append(weight if v == u else weight * _moved_share(u, v, row.rule))
    ids = list(slots)
    for t, j in enumerate(slots):
        first = slots.index(j)
        if first < t:
            weights[first] += weights[t]
            ids[t], weights[t] = slots[0] if repeats_first else FREE, 0.0
    return ids, weights


def _stand_in(u: int, rule: Numbers, active: Sequence[int]) -> int:
    """The expert that runs in place of u for a row whose slots move."""
    if u in active or not active:
        return u
    similarity = np.asarray(rule["similarity"], dtype=np.float32)
    best = active[0]
    for v in active:  # ascending, so an equal later value does not win
        if similarity[u, v] > similarity[u, best]:
            best = v
    return best if similarity[u, best] >= np.float32(rule["threshold"]) else u


def _moved_share(u: int, v: int, rule: Numbers) -> float:
    """What a slot of u weighs on v, of what it weighed on u."""
    if rule["compensation"] is not None:
        return float(np.float32(rule["compensation"]))
    coefficients = rule["coefficients"]
    return 1.0 if coefficients is None else float(np.float32(coefficients[u][v]))


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
    """A model's router.

    The correction bias takes part in choosing, never in the weights. With a group limit only the
    experts of the best groups may be chosen: a group counts by its best score when there is no
    bias and by the sum of its two best biased scores when there is one. The others score -inf;
    their gate is what they would weigh, though the model never chooses them.

    Args:
        logits: ``[num_tokens, num_experts]``. NaN ranks last and has gate 0.
        scoring: softmax, sigmoid or sqrtsoftplus.
        bias: ``[num_experts]``, added to gates for ranking.
        n_groups, best_groups: groups of equal size, and how many of them may be chosen from.
    """
    num_rows, num_experts = logits.shape
    scores, gates = np.zeros((2, num_rows, num_experts), dtype=np.float64)
    ids = np.zeros((num_rows, k), dtype=np.int64)
    weights = np.zeros((num_rows, k), dtype=np.float64)
    for b in range(num_rows):
        row = [float(x) for x in logits[b]]
        gate = _gates(row, scoring)
        score = list(row)  # the maps are monotone, so the logits rank the experts exactly
        if bias is not None:
            score = [
                x if math.isnan(x) else g + float(c)
                for x, g, c in zip(row, gate, bias, strict=True)
            ]
        if n_groups is not None and best_groups is not None:
            score = _limited(score, n_groups, best_groups, has_bias=bias is not None)
        chosen = in_rank_order(list(range(num_experts)), score)[:k]
        total = sum(gate[j] for j in chosen)
        scores[b], gates[b], ids[b] = score, gate, chosen
        for t, j in enumerate(chosen):
            weight = gate[j] / total if renormalize and total > 0.0 else gate[j]
            weights[b, t] = weight * scale
    return Scored(scores, gates, ids, weights)


def _gates(logits: Sequence[float], scoring: str) -> list[float]:
    """The gates of one row in float64; NaN has none, and infinity is the largest float32."""
    largest = float(np.finfo(np.float32).max)
    row = [-math.inf if math.isnan(x) else min(x, largest) for x in logits]
    if scoring == "sigmoid":
        return [_sigmoid(x) for x in row]
    if scoring == "sqrtsoftplus":
        return [0.0 if x < FAINTEST else math.sqrt(np.logaddexp(0.0, x)) for x in row]
    if scoring != "softmax":
        raise ValueError(f"no scoring {scoring!r}; known: softmax, sigmoid, sqrtsoftplus")
    top = max(row)
    if top == -math.inf:
        return [0.0] * len(row)
    total = sum(math.exp(x - top) for x in row)
    return [
        math.exp(x - top) / total if np.float32(x) - np.float32(top) >= FAINTEST else 0.0
        for x in row
    ]


def _sigmoid(x: float) -> float:
    """The logistic function in float64 without overflow."""
    if x < FAINTEST:
        return 0.0
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def _limited(
    scores: Sequence[float], n_groups: int, best_groups: int, *, has_bias: bool
) -> list[float]:
    """The scores of one row, -inf outside its best groups."""
    size = len(scores) // n_groups
    strengths = []
    for g in range(n_groups):
        members = [-math.inf if math.isnan(x) else x for x in scores[g * size : (g + 1) * size]]
        strengths.append(sum(sorted(members, reverse=True)[: 2 if has_bias else 1]))
    kept = in_rank_order(list(range(n_groups)), strengths)[:best_groups]
    return [x if j // size in kept else -math.inf for j, x in enumerate(scores)]
