"""Make a summary, as committed in docs/bench, of the JSON that a measurement wrote.

    python scripts/studies/summarise.py serve out/result.json --out docs/bench/serve.json \\
        --config configs/bench.yaml

Kinds: evaluate, serve and layer (`bench`), soak, overhead, share (overhead_share.py), grouping
(router_grouping.py), calibration (calibration_figures.py). Figures that the documents use and their
spread stay; single runs, losses of sequences and series over time go. A table is its columns and
one row a line. `command` and `config` are what the file holds unless they are given.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_LINES = 60
WIDTH = 200
DIGITS = 5  # significant ones
SETTINGS = ("rounds", "threads", "dtype", "repetitions", "max_tokens", "layers", "metric", "tokens")
"""Where they are not under `settings`."""
HEAD = ("command", "config", "commit", "date", "machine")
PHASE = ("seconds", "requests", "tokens", "tokens_per_s", "retractions", "rows_implied")
ACTIVE = ("rows_per_step", "active_experts", "active_experts_base")
SERVED = ("tpot_ms", "ttft_ms", "output_tokens_per_s", "active_experts", "active_experts_base")
QUALITY = ("tokens", "cross_entropy", "delta", "ci95", "agreement", *ACTIVE[1:])

Found = Mapping[str, Any]
Row = Mapping[str, Any]


def table(rows: Iterable[Row]) -> dict[str, Any]:
    """Columns and rows; null where a row lacks a column."""
    kept = list(rows)
    columns = list(dict.fromkeys(name for row in kept for name in row))
    return {"columns": columns, "rows": [[row.get(name) for name in columns] for row in kept]}


def pick(figures: Row, names: Sequence[str]) -> dict[str, Any]:
    """Some figures, each with its spread where there is one."""
    spreads = {name: (name, f"{name}_spread") for name in names}
    wanted = [each for name in names for each in spreads[name]]
    return {name: figures[name] for name in wanted if name in figures}


def evaluate(found: Found) -> dict[str, Any]:
    rows = [
        {"section": section, "policy": policy, "batch": int(size), **pick(measured, QUALITY)}
        for section in ("policies", "same_domain", "mixed_policies")
        for policy, sizes in found.get(section, {}).items()
        for size, measured in sizes.items()
    ]
    kept = {name: found[name] for name in ("model", "vanilla_rounding") if name in found}
    pairs = {"pairs": table(found["pairs"])} if "pairs" in found else {}
    return kept | table(rows) | pairs


def serve(found: Found) -> dict[str, Any]:
    rows = ({"policy": name, **pick(row, SERVED)} for name, row in found["policies"].items())
    runs = (pick(run, ("round", "policy", *SERVED)) for run in found["runs"])
    return table(rows) | {"runs": table(runs)}


def layer(found: Found) -> dict[str, Any]:
    cases = defaultdict(list)
    for case in found["cases"]:
        cases[case["shape"], case["impl"]].append(case)
    rows = (
        {
            "shape": shape,
            "impl": impl,
            "variant": mine[0]["variant"].partition(",")[0],
            "relative_error": found["relative_error"][shape][impl],
            **found["fit"][shape][impl],
            "median_ms": [case["median_ms"] for case in mine],
        }
        for (shape, impl), mine in cases.items()
    )
    ours = {shape: mine for (shape, impl), mine in cases.items() if impl == "ours"}
    spans = {shape: [middle_half(case) for case in mine] for shape, mine in ours.items()}
    return {
        **{name: found[name] for name in ("stream_gb_s", "stream_quartiles_gb_s", "versions")},
        **{
            name: {shape: [case[name] for case in mine] for shape, mine in ours.items()}
            for name in ("active_experts", "stream_fraction")
        },
        "middle_half_of_ours": {shape: [min(span), max(span)] for shape, span in spans.items()},
        **table(rows),
    }


def middle_half(case: Row) -> float:
    """How far the middle half of the times spans, as a share of the median."""
    return round((case["q3_ms"] - case["q1_ms"]) / case["median_ms"], 3)


def soak(found: Found) -> dict[str, Any]:
    phases = (
        {
            "phase": phase["name"],
            "at_a_time": phase["concurrency"],
            **pick(phase, PHASE),
            "rows": max(phase["rows"]),
            **{kind: phase["outcomes"].get(kind, 0) for kind in ("cancelled", "refused", "failed")},
            "tpot_ms": [phase["tpot_ms"]["p50"], phase["tpot_ms"]["p99"]],
            **pick(phase, ACTIVE),
            **pick(phase, ("used_tokens_when_idle",)),
        }
        for phase in found["phases"]
    )
    memory = ({"process": name.split()[0], **row} for name, row in found["memory"].items())
    kept = ("requests_after_warm_up", "reloads", "problems")
    return {name: found[name] for name in kept} | table(phases) | {"memory": table(memory)}


def overhead(found: Found) -> dict[str, Any]:
    return table(
        {
            "comparison": title,
            **pick(row, ("pairs", "tpot_ms_of_the_second")),
            **{
                f"{what}_{name}": row[what].get(name)
                for what in ("tpot", "cpu")
                for name in ("ratio", "low", "high")
            },
            "tpot_of_rounds": row["tpot"].get("of_rounds"),
        }
        for title, row in found["comparisons"].items()
    )


def share(found: Found) -> dict[str, Any]:
    return table(
        {"model": model, "policy": policy, "samples": row["samples"]}
        | {name: list(part.values()) for name, part in row.items() if name != "samples"}
        for model, measured in found["models"].items()
        for policy, row in measured["policies"].items()
    )


def grouping(found: Found) -> dict[str, Any]:
    rows = (
        {"requests": name, "arrangement": arrangement, "worker": worker, **row}
        for name, arrangements in found["results"].items()
        for arrangement, each in arrangements.items()
        for worker, row in [*enumerate(each["workers"]), ("both", each["both"])]
    )
    return {name: found[name] for name in ("model", "requests")} | table(rows)


def calibration(found: Found) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in HEAD + SETTINGS}


KINDS = {
    kind.__name__: kind
    for kind in (evaluate, serve, layer, soak, overhead, share, grouping, calibration)
}


def rounded(value: Any) -> Any:
    """The same with floats of a few significant digits."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def lay_out(value: Any, indent: int = 0, taken: int = 0) -> str:
    """JSON in which what fits on a line is one, and a row of a table has its own.

    Args:
        taken: characters of the first line that are a key's.
    """
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent + taken < WIDTH or not value or not isinstance(value, Mapping | list):
        return line
    inner = indent + 1
    if isinstance(value, list):
        names, items, ends = [""] * len(value), value, "[]"
    else:
        names, items, ends = [f"{json.dumps(n)}: " for n in value], list(value.values()), "{}"
    parts = [n + lay_out(item, inner, len(n)) for n, item in zip(names, items, strict=True)]
    is_table = isinstance(value, list) and isinstance(value[0], list)
    if indent and not is_table and not any("\n" in part for part in parts):
        parts = _filled(parts, WIDTH - inner)
    body = f",\n{' ' * inner}".join(parts)
    return f"{ends[0]}\n{' ' * inner}{body}\n{' ' * indent}{ends[1]}"


def _filled(parts: Sequence[str], width: int) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 2 < width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def head(found: Found, command: str, config: Any, commit: str, date: str) -> dict[str, Any]:
    """How to repeat it, and on what it was measured."""
    machine = {name: value for name, value in found["machine"].items() if value is not None}
    machine.pop("system", None)  # a kernel's name says which machine it was
    values = (_wrapped(command), _wrapped(config), commit, date, machine)
    return dict(zip(HEAD, values, strict=True))


def _wrapped(text: Any) -> Any:
    """A long text as a list of lines, to be joined by blanks."""
    is_long = isinstance(text, str) and len(text) > WIDTH - 15
    return textwrap.wrap(text, WIDTH - 15, break_on_hyphens=False) if is_long else text


def write(summary: Found, out: Path) -> None:
    """Raises `ValueError` for more than `MAX_LINES` lines."""
    text = lay_out(rounded(summary)) + "\n"
    if (lines := text.count("\n")) > MAX_LINES:
        raise ValueError(f"{out}: a summary has at most {MAX_LINES} lines, this has {lines}")
    out.write_text(text, encoding="utf-8")


def head_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    measured: Annotated[Path, typer.Argument(help="The JSON that the measurement wrote.")],
    out: Annotated[Path, typer.Option(help="The summary to write.")],
    command: Annotated[str, typer.Option(help="What measured it.")] = "",
    config: Annotated[str, typer.Option(help="The routing config; settings are added.")] = "",
    commit: Annotated[str, typer.Option(help="What was measured; the checkout by default.")] = "",
    date: Annotated[str, typer.Option(help="When it was measured; today by default.")] = "",
) -> None:
    """Write a summary of a measurement."""
    found = json.loads(measured.read_text(encoding="utf-8"))
    command = command or found.get("command", "")
    if not command:
        raise typer.BadParameter(f"{measured} does not say what measured it: give --command")
    settings = found.get("settings") or {name: found[name] for name in SETTINGS if name in found}
    settings |= {"routing_config": config} if config else {}
    commit, date = commit or head_commit(), date or str(datetime.date.today())
    about = head(found, command, settings, commit, date)
    write(about | KINDS[kind](found), out)


if __name__ == "__main__":
    typer.run(main)
