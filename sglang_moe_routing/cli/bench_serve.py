"""``bench serve``: a real server under each policy, timed by SGLang's own benchmark client."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from .. import demo as assets
from ..bench.serve import Run, Settings, Target, measure, summary
from ..config import bundled_config, load_config
from ..errors import EngineError
from ..serving.load import served_policies, wanted_policies
from ..serving.machine import describe_machine
from ..serving.server import running_server
from .options import ApiKey, Cpu, Policies, Temperature
from .output import (
    Json,
    clear_errors,
    command_line,
    console,
    dense_table,
    errors,
    print_json,
    rounded,
    say,
    showing_start,
)


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or name; with --url, whose tokenizer to use.")
    ] = None,
    routing_config: Annotated[
        Path | None,
        typer.Option(help="Routing config (YAML) of the server; configs/bench.yaml if absent."),
    ] = None,
    policies: Policies = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests in flight.")
    ] = Settings.concurrency,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = Settings.input_len,
    output_len: Annotated[
        int, typer.Option(min=2, help="Tokens per answer.")
    ] = Settings.output_len,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests of a run; twice the concurrency if absent.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs under each policy.")] = Settings.rounds,
    temperature: Temperature = Settings.temperature,
    url: Annotated[
        str | None, typer.Option(help="Root of a running server; starts one if absent.")
    ] = None,
    api_key: ApiKey = "none",
    cpu: Cpu = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for result, raw results and logs; else temporary.")
    ] = None,
    json: Json = False,
) -> None:
    """Time requests end to end under each policy; show active experts beside the times.

    Policies take turns, round by round. Options after -- go to SGLang's server.
    """
    settings = Settings(
        concurrency=concurrency,
        input_len=input_len,
        output_len=output_len,
        num_prompts=num_prompts or 2 * concurrency,
        rounds=rounds,
        temperature=temperature,
    )
    folder = out or Path(tempfile.mkdtemp(prefix="sglang-moe-routing-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    with clear_errors(), errors.status("starting the server") as status, ExitStack() as stack:
        if url is not None:
            _refuse_what_only_a_server_needs(routing_config, cpu, context.args)
            target, names = _running(url, model, policies, api_key)
        elif model is None:
            raise typer.BadParameter("give a MODEL to serve, or the --url of a running server")
        else:
            path = routing_config or bundled_config("bench.yaml")
            wanted_policies(policies, load_config(path).config.choosable)
            server = stack.enter_context(
                running_server(
                    model,
                    config=path,
                    flags=["--random-seed", "0", *context.args],
                    log=folder / "server.log",
                    cpu=cpu,
                    on_wait=showing_start(status),
                )
            )
            target, names = _running(server.url, model, policies, api_key)
            target = replace(target, check=server.check)
        work = measure(target, names, assets.read_prompts(), settings, folder, status.update)
        runs = asyncio.run(work)
    result = _as_json(runs, target, settings)
    (folder / "result.json").write_text(dumps(result, indent=2) + "\n")
    if json:
        print_json(result)
    else:
        _print(result["policies"], settings)
    say(f"raw results and logs: {folder}", to=errors)


def _refuse_what_only_a_server_needs(
    config: Path | None, cpu: bool | None, flags: Sequence[str]
) -> None:
    given = {"--routing-config": config, "--cpu/--no-cpu": cpu, "SGLANG OPTIONS": flags or None}
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"{name} is for a server that is started here, not --url")


def _running(
    url: str, tokenizer: str | None, policies: str | None, api_key: str
) -> tuple[Target, list[str]]:
    """The server at `url`, and the policies to measure."""
    try:
        header, names = served_policies(url, wanted=policies, api_key=api_key)
        if tokenizer is None:
            authorization = {"Authorization": f"Bearer {api_key}"}
            info = httpx.get(f"{url.rstrip('/')}/model_info", headers=authorization, timeout=30)
            tokenizer = info.raise_for_status().json()["tokenizer_path"]
    except httpx.HTTPError as error:
        raise EngineError(f"no answer from {url}: {error}. Is the server running there?") from error
    return Target(url, tokenizer, header, api_key), names


def _as_json(runs: Sequence[Run], target: Target, settings: Settings) -> dict[str, Any]:
    return {
        "policies": summary(runs),
        "settings": {"model": target.tokenizer, **asdict(settings)},
        "machine": describe_machine(),
        "command": command_line(),
        "runs": [asdict(run) for run in runs],
    }


def _print(policies: Mapping[str, Mapping[str, Any]], settings: Settings) -> None:
    title = (
        f"{settings.concurrency} requests at a time, {settings.rounds} rounds of "
        f"{settings.num_prompts} requests, {settings.input_len} + {settings.output_len} tokens"
    )
    columns = {
        "T": "active_experts",
        "T\nbase": "active_experts_base",
        "TPOT\nms": "tpot_ms",
        "\n+-": "tpot_ms_spread",
        "saving\n%": "tpot_saving_percent",
        "ITL\nms": "itl_ms",
        "ITL\np95": "itl_p95_ms",
        "TTFT\nms": "ttft_ms",
        "tok/s": "output_tokens_per_s",
    }
    table = dense_table(title, "policy", columns)
    for name, figures in policies.items():
        values = [figures[key] for key in columns.values()]
        table.add_row(name, *map(rounded, values))
    console.print(table)
