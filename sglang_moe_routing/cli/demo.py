"""``demo``: the real server, a small trained model, and a proof that routing does what it says."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import demo as assets
from .. import environment
from ..config import VANILLA, LoadedConfig, load_config
from ..errors import CheckError
from ..serving.load import Answer, Job, Load, LoadClient
from ..serving.server import Server, has_accelerator, running_server
from ..testing import Checked, check_calls, read_records
from .output import Json, clear_errors, console, errors, print_json, rounded, say, showing_start

NUM_REQUESTS = 16
MAX_TOKENS = 32
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Outcome:
    """What the demo measured and checked.

    Attributes:
        loads: policy -> 16 concurrent requests under it alone.
        mixed: 16 concurrent requests under all policies in turn.
        checked: what every recorded MoE call of the mixed batch was held to the oracle with; None
            if one did not pass.
        problem: of the first that did not.
        same_text_alone: whether the vanilla texts of the mixed batch equal what the same
            requests give one at a time.
    """

    loads: Mapping[str, Load]
    mixed: Load
    checked: Checked | None
    problem: str | None
    same_text_alone: bool


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    json: Json = False,
) -> None:
    """Serve the bundled model for real, compare its policies, check what the experts did.

    Exit status 0 only if every vanilla row kept the engine's routing bit for bit, and every
    re-routed row has the experts and weights that the rule of its policy gives.
    """
    folder = Path(tempfile.mkdtemp(prefix="sglang-moe-routing-demo-"))
    with clear_errors():
        loaded = load_config(assets.CONFIG)
        with _served(folder, keep) as server:
            with errors.status("sending requests") as status:
                outcome = asyncio.run(_run(server, loaded, folder / "records", status.update))
            if json:
                print_json(_as_json(outcome))
            else:
                _print(outcome)
            if keep:
                say(
                    f"the server stays at {server.url} (process {server.process.pid}); try:\n"
                    f"  sglang-moe-routing client --url {server.url} --policies vanilla,oea-k3",
                    to=errors,
                )
    raise typer.Exit(0 if outcome.checked else 1)


@contextmanager
def _served(folder: Path, keep: bool) -> Iterator[Server]:
    flags = ["--served-model-name", "demo", "--random-seed", "0"]
    if has_accelerator():
        flags += ["--cuda-graph-backend-decode", "disabled"]  # the recorder decodes eagerly
    settings = {
        environment.RECORD: str(folder / "records"),
        "OMP_NUM_THREADS": "1",  # the model is too small for more
    }
    with ExitStack() as stack:
        with errors.status("starting the server") as status:
            server = stack.enter_context(
                running_server(
                    assets.MODEL,
                    config=assets.CONFIG,
                    flags=flags,
                    environment=settings,
                    log=folder / "server.log",
                    stop=not keep,
                    on_wait=showing_start(status),
                )
            )
        yield server


async def _run(
    server: Server, loaded: LoadedConfig, records: Path, say: Callable[[str], None]
) -> Outcome:
    client = LoadClient(server.url)
    names = loaded.config.names
    prompts = assets.read_prompts()[:NUM_REQUESTS]
    await client.run([Job(p, VANILLA) for p in prompts], max_tokens=WARM_UP_TOKENS)
    loads = {}
    for name in names:
        say(f"{NUM_REQUESTS} concurrent requests under {name}")
        loads[name] = await client.run([Job(p, name) for p in prompts], max_tokens=MAX_TOKENS)

    say("one batch under all policies, every MoE call recorded")
    jobs = [Job(p, names[i % len(names)]) for i, p in enumerate(prompts)]
    records.mkdir()
    mixed = await client.run(jobs, max_tokens=MAX_TOKENS)
    calls = list(read_records(records))
    records.rename(records.with_name("mixed-batch"))  # recording stops

    say("the vanilla requests of that batch, one at a time")
    vanilla = [answer for answer in mixed.answers if answer.job.policy == VANILLA]
    alone = [await _alone(client, answer) for answer in vanilla]
    checked, problem = _check(calls)
    return Outcome(
        loads=loads,
        mixed=mixed,
        checked=checked,
        problem=problem,
        same_text_alone=alone == [answer.text for answer in vanilla],
    )


def _check(calls: list[dict[str, Any]]) -> tuple[Checked | None, str | None]:
    try:
        checked = check_calls(calls)
    except CheckError as error:
        return None, str(error)
    return (checked, None) if checked.rows else (None, "no row was recorded")


async def _alone(client: LoadClient, answer: Answer) -> str:
    load = await client.run([answer.job], max_tokens=MAX_TOKENS)
    return load.answers[0].text


def _as_json(outcome: Outcome) -> dict[str, Any]:
    mixed, checked = outcome.mixed, outcome.checked
    by_policy: dict[str, list[Answer]] = {}
    for answer in mixed.answers:
        by_policy.setdefault(answer.job.policy, []).append(answer)
    return {
        "sglang": version("sglang"),
        "device": _device(),
        "model": "demo",
        "policies": {name: load.figures() for name, load in outcome.loads.items()},
        "mixed": {
            "policies": {
                name: {"requests": len(answers), "tokens": sum(a.num_tokens for a in answers)}
                for name, answers in by_policy.items()
            },
            **mixed.figures(),
            "calls_checked": checked.num_calls if checked else 0,
            "rows_checked": dict(checked.rows) if checked else {},
            "problem": outcome.problem,
            "vanilla_text_same_alone": outcome.same_text_alone,
        },
    }


def _print(outcome: Outcome) -> None:
    table = Table(title=f"{NUM_REQUESTS} concurrent requests on {_device()}", expand=True)
    checked = outcome.checked
    for column in ("policy", "tokens", "active experts", "without", "TPOT ms", "checked"):
        table.add_column(column, no_wrap=True)
    table.add_column("sample", no_wrap=True, overflow="ellipsis", ratio=1)
    rows = [*outcome.loads.items(), ("all mixed", outcome.mixed)]
    counts = Counter(checked.rows if checked else {})
    num_rows, num_vanilla = counts.total(), counts[VANILLA]
    counts["all mixed"] = num_rows
    for name, load in rows:
        figures = load.figures()
        table.add_row(
            name,
            str(load.num_tokens),
            rounded(figures["active_experts"]),
            rounded(figures["active_experts_base"]),
            rounded(figures["tpot_ms"]),
            str(counts[name]),
            " ".join(load.answers[0].text.split()),
        )
    console.print(table)
    console.print(
        "active experts: mean per MoE layer and decode step; without: what the router had chosen;\n"
        "checked: rows of the mixed batch, held to a slow statement of the rules\n"
    )
    console.print(
        f"mixed batch: {checked.num_calls if checked else 'not all'} recorded MoE calls passed\n"
        f"  vanilla rows bit for bit the engine's own: {_yes(checked)} ({num_vanilla} rows)\n"
        f"  re-routed rows have the experts and weights of their rules: {_yes(checked)} "
        f"({num_rows - num_vanilla} rows)\n"
        f"  vanilla texts equal those of the same requests alone: {_yes(outcome.same_text_alone)}"
        + ("" if outcome.same_text_alone else " (rounding: see docs/batch-dependence.md)"),
        highlight=False,
    )
    if outcome.problem:
        console.print(f"  {outcome.problem}", style="red", markup=False)


def _yes(value: object) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"


def _device() -> str:
    if not has_accelerator():
        return "cpu"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "xpu"
