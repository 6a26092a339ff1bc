"""What is wrong with what a server counted, holds, and logged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .answers import Outcome
from .asks import Served
from .readings import Reading, differences

NEVER_MORE_ACTIVE = {"vanilla", "topk", "oea", "sere"}
"""Kinds that run no expert which the batch's own routing would not have run."""
FAULTS = re.compile(
    r"Traceback|leak detected|Scheduler hit an exception|use-after-free|double free"
)


@dataclass(frozen=True)
class Rows:
    """Bounds on the decode rows of every layer in a phase."""

    at_least: int
    at_most: int


def implied_rows(outcomes: Sequence[Outcome], retracted: int) -> Rows:
    """Decode rows that answers imply.

    The prompt's forward makes the first of m tokens, decode rows the other m - 1. A retracted
    request is prefilled again, which makes one more of them. A request that was given up has come
    to any number of rows.
    """
    done = [outcome.ask for outcome in outcomes if outcome.kind == "completed"]
    rows = sum(ask.n * (ask.max_tokens - 1) for ask in done)
    given_up = [outcome.ask for outcome in outcomes if outcome.kind in ("cancelled", "failed")]
    more = sum(ask.n * (ask.max_tokens - 1) for ask in given_up if ask.refusal is None)
    return Rows(max(0, rows - retracted), rows + more)


def check_counts(
    before: Reading, after: Reading, outcomes: Sequence[Outcome], served: Served
) -> list[str]:
    """What is wrong with the statistics of a phase."""
    bounds = implied_rows(outcomes, after.retracted - before.retracted)
    found = []
    layers = differences(before, after)
    if not layers or not all(layer["calls"] for layer in layers):
        found.append(f"a layer counted no calls: {layers}")
    for name in ("rows", "calls"):
        if len({layer[name] for layer in layers}) > 1:
            found.append(f"layers counted different {name}: {[layer[name] for layer in layers]}")
    bounded = {served.kinds[name] for name in served.names} <= NEVER_MORE_ACTIVE
    for layer in layers:
        if not bounds.at_least <= layer["rows"] <= bounds.at_most:
            found.append(
                f"layer {layer['layer']} counted {layer['rows']} decode rows; the answers imply "
                f"{bounds.at_least} to {bounds.at_most}"
            )
        if bounded and layer["active_experts"] > layer["active_experts_base"]:
            found.append(f"layer {layer['layer']} ran more experts than without policies: {layer}")
        if layer["critical_experts"] > layer["active_experts"] or layer["calls"] > layer["rows"]:
            found.append(f"layer {layer['layer']} has impossible counts: {layer}")
    return found


def check_metrics(
    before: Reading, after: Reading, outcomes: Sequence[Outcome], *, exact: bool
) -> list[str]:
    """What is wrong with this package's metrics of a phase.

    Args:
        exact: nothing was given up or retracted, so that every policy's rows are known.
    """
    found = []
    rows = {name: count - before.rows.get(name, 0) for name, count in after.rows.items()}
    counted = sum(layer["rows"] for layer in differences(before, after)[:1])
    if sum(rows.values()) != counted:
        found.append(f"the metrics have {rows} decode rows, the statistics {counted}")
    implied = Counter[str]()
    for outcome in outcomes:
        if outcome.kind == "completed":
            implied[outcome.ask.policy] += outcome.ask.n * (outcome.ask.max_tokens - 1)
    if exact and +Counter(rows) != +implied:
        found.append(f"the metrics have {rows} decode rows, the answers imply {dict(implied)}")
    refused = sum(outcome.kind == "refused" for outcome in outcomes)
    if after.rejected - before.rejected != refused:
        found.append(f"the metrics have {after.rejected - before.rejected} refusals, not {refused}")
    return found


def check_state(baseline: Reading, after: Reading) -> list[str]:
    """What is wrong with an idle server."""
    found = []
    if after.used_tokens != baseline.used_tokens:
        found.append(
            f"{after.used_tokens} KV tokens are in use while idle, {baseline.used_tokens} at first"
        )
    if after.retracted != after.retracted_metric:
        found.append(
            f"{after.retracted} retractions in the log, {after.retracted_metric} in the metrics"
        )
    gone = set(baseline.rss_mib) - set(after.rss_mib)
    if gone:
        found.append(f"processes ended: {', '.join(sorted(gone))}")
    return found


def check_growth(
    warm: Mapping[str, float], end: Mapping[str, float], num_requests: int, bound_mib: float
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Growth of every process after the warm-up, and what of it is too much."""
    memory, found = {}, []
    for label, last in end.items():
        first = warm.get(label, 0.0)  # a process that came later grew from nothing
        growth = last - first
        memory[label] = {
            "warm_mib": first,
            "end_mib": last,
            "growth_mib": round(growth, 2),
            "growth_mib_per_1000_requests": round(1000 * growth / max(1, num_requests), 3),
        }
        if growth > bound_mib:
            found.append(
                f"{label} grew by {growth:.1f} MiB over {num_requests} requests, "
                f"more than {bound_mib:.0f}"
            )
    return memory, found


def check_log(text: str) -> list[str]:
    """Lines of the server's log that should not be there."""
    return [f"in the log: {line}" for line in text.splitlines() if FAULTS.search(line)]
