"""Figures of a soak, as JSON and as tables."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .answers import Outcome
from .checks import implied_rows
from .readings import Reading, differences


def summarize(
    outcomes: Sequence[Outcome], duration_s: float, before: Reading, after: Reading
) -> dict[str, Any]:
    """Figures of a phase."""
    asks = [outcome.ask for outcome in outcomes]
    done = [outcome for outcome in outcomes if outcome.kind == "completed"]
    tokens = sum(outcome.ask.n * outcome.ask.max_tokens for outcome in done)
    layers, retracted = differences(before, after), after.retracted - before.retracted
    bounds = implied_rows(outcomes, retracted)
    sums = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    calls = max(1, sums["calls"])
    return {
        "seconds": round(duration_s, 1),
        "requests": len(asks),
        "outcomes": Counter(outcome.kind for outcome in outcomes),
        "policies": Counter(ask.policy for ask in asks),
        "named_by": Counter(ask.way for ask in asks),
        "endpoints": Counter(ask.path for ask in asks),
        "streamed": sum(ask.stream for ask in asks),
        "with_n_2": sum(ask.n == 2 for ask in asks),
        "tokens": tokens,
        "tokens_per_s": round(tokens / duration_s, 1),
        "requests_per_s": round(len(asks) / duration_s, 2),
        "tpot_ms": percentiles([outcome.tpot_s for outcome in done]),
        "ttft_ms": percentiles([outcome.ttft_s for outcome in done]),
        "retractions": retracted,
        "rows": [layer["rows"] for layer in layers],
        "rows_implied": [bounds.at_least, bounds.at_most],
        "rows_per_step": round(sums["rows"] / calls, 2),
        "active_experts": round(sums["active_experts"] / calls, 2),
        "active_experts_base": round(sums["active_experts_base"] / calls, 2),
        "used_tokens_when_idle": after.used_tokens,
        "rss_mib": dict(after.rss_mib),
    }


def percentiles(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Percentiles in milliseconds; None for fewer than two values."""
    known = [1e3 * value for value in seconds if value is not None]
    if len(known) < 2:
        return None
    cuts = statistics.quantiles(known, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 1) for p in (50, 90, 99)}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Tables of the phases and of memory, and the problems."""
    columns = ("phase", "requests", "given up", "refused", "failed", "retracted", "tokens/s")
    table = Table(*columns, "TPOT p50, p99 (ms)", "rows", "implied")
    for phase in result["phases"]:
        outcomes, tpot = phase["outcomes"], phase["tpot_ms"]
        kinds = [str(outcomes.get(kind, 0)) for kind in ("cancelled", "refused", "failed")]
        cells = [phase["retractions"], phase["tokens_per_s"]]
        cells += [f"{tpot['p50']}, {tpot['p99']}" if tpot else "", max(phase["rows"])]
        low, high = phase["rows_implied"]
        implied = str(low) if low == high else f"{low} to {high}"
        table.add_row(phase["name"], str(phase["requests"]), *kinds, *map(str, cells), implied)
    console.print(table)
    names = ("warm_mib", "end_mib", "growth_mib_per_1000_requests", "slope_mib_per_minute")
    table = Table("process", "warm (MiB)", "end (MiB)", "per 1000 requests", "per minute")
    for label, figures in result["memory"].items():
        table.add_row(label, *(str(figures.get(name, "")) for name in names))
    console.print(table)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False)
    verdict = f"{len(result['problems'])} problems" if result["problems"] else "no problems"
    console.print(f"{verdict}, {sum(phase['requests'] for phase in result['phases'])} requests")


def report(result: Mapping[str, Any], out: Path, console: Console) -> int:
    """Write and show a result.

    Returns:
        The command's status.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, console)
    return 1 if result["problems"] else 0
