"""``client``: send prompts to a running server under chosen policies and compare them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import typer
from rich.table import Table

from .. import demo as assets
from ..serving.load import Job, Load, LoadClient, served_policies
from .options import ApiKey, Policies, Temperature
from .output import Json, clear_errors, console, errors, fail, print_json, rounded


def client(
    url: Annotated[str, typer.Option(help="Root of the server.")] = "http://127.0.0.1:30000",
    policies: Policies = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to send; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt a line; the bundled ones if absent."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 64,
    temperature: Temperature = 0.0,
    api_key: ApiKey = "none",
    json: Json = False,
) -> None:
    """Send the same prompts at once under each policy; show speed, active experts and answers.

    Every policy gets the same `concurrency` requests on an empty prefix cache. Other traffic on
    the server at the same time would be counted too.
    """
    texts = _prompts(prompt, prompts)
    try:
        with clear_errors():
            header, names = served_policies(url, wanted=policies, api_key=api_key)
        sender = LoadClient(url, header=header, api_key=api_key)
        work = _compare(sender, names, texts, concurrency, max_tokens, temperature)
        loads = asyncio.run(work)
    except openai.APIStatusError as error:
        fail(f"the server refused: {error.message}")
    except (httpx.HTTPError, openai.APIError) as error:
        fail(f"no answer from {url}: {error}. Is the server running there?")
    if json:
        print_json({"url": url, "policies": {n: _as_json(load) for n, load in loads.items()}})
    else:
        _print(loads, show_text=bool(prompt))


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if given:
        return given
    if file is None:
        return assets.read_prompts()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read prompts from {file}: {error}")
    texts = [line for line in lines if line.strip()]
    return texts or fail(f"{file} has no prompts; write one a line")


async def _compare(
    sender: LoadClient,
    names: list[str],
    texts: list[str],
    concurrency: int,
    max_tokens: int,
    temperature: float,
) -> dict[str, Load]:
    loads = {}
    with errors.status("sending requests") as status:
        for name in names:
            status.update(f"{concurrency} concurrent requests under {name}")
            jobs = [Job(texts[i % len(texts)], name) for i in range(concurrency)]
            loads[name] = await sender.run(jobs, max_tokens=max_tokens, temperature=temperature)
    return loads


def _as_json(load: Load) -> dict[str, Any]:
    return {
        **load.figures(),
        "tokens_per_s": round(load.tokens_per_s, 3),
        "texts": [answer.text for answer in load.answers],
    }


def _print(loads: dict[str, Load], show_text: bool) -> None:
    table = Table("policy", "requests", "tokens/s", "TPOT ms", "active experts", "without policy")
    for name, load in loads.items():
        found = _as_json(load)
        keys = ("tokens_per_s", "tpot_ms", "active_experts", "active_experts_base")
        table.add_row(name, str(found["requests"]), *(rounded(found[key]) for key in keys))
    console.print(table)
    if show_text:
        for name, load in loads.items():
            answer = load.answers[0]
            console.print(f"[bold]{name}[/]", highlight=False)
            console.print(answer.job.prompt + answer.text, markup=False, highlight=False)
