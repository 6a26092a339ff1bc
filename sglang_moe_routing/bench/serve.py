"""Time a real server end to end under each policy, with SGLang's own benchmark client.

The client is ``sglang.benchmark.serving`` (``sglang.bench_serving`` of earlier releases). It runs
in a process of its own and names the policy in a header. It does not look at response headers: a
wave of warm-up requests before each run makes sure that the server applies the policy. The server's
own counts, read before and after a run, give the active experts of exactly that run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from ..config import DEFAULT_HEADER, VANILLA
from ..environment import INSTALL_SGLANG
from ..errors import BenchError, EngineError
from ..serving.load import Job, LoadClient, mean_active_experts, read_counts

WARM_UP_TOKENS = 4
_TIMEOUT_S = 60.0
_MODULE = "sglang.benchmark.serving"
_FIGURES = {
    "tpot_ms": "median_tpot_ms",
    "itl_ms": "median_itl_ms",
    "itl_p95_ms": "p95_itl_ms",
    "ttft_ms": "median_ttft_ms",
    "output_tokens_per_s": "output_throughput",
}
"""Our figures and the client's names of them."""


@dataclass(frozen=True)
class Settings:
    """What to send.

    Attributes:
        concurrency: requests in flight.
        input_len, output_len: tokens of every prompt and of every answer.
        num_prompts: requests of a run.
        rounds: runs under each policy.
        temperature: of sampling. At 0 a random model may fall into a loop that all rows share.
    """

    concurrency: int = 16
    input_len: int = 64
    output_len: int = 32
    num_prompts: int = 32
    rounds: int = 5
    temperature: float = 1.0


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        url: its root.
        tokenizer: folder or name of the model's tokenizer, for the client.
        header: name of the policy header.
        check: raises `EngineError` if the server is known to have ended.
    """

    url: str
    tokenizer: str
    header: str = DEFAULT_HEADER
    api_key: str = "none"
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Run:
    """One run of the client.

    Attributes:
        tpot_ms: milliseconds per output token after the first, median over requests.
        itl_ms, itl_p95_ms: milliseconds between two tokens, median and 95th percentile.
        ttft_ms: milliseconds to the first token, median over requests.
        active_experts, active_experts_base: mean per MoE layer and decode step, as run and
            without policies; None if the server keeps no statistics.
        rows_per_step: mean decoding requests per step.
    """

    policy: str
    round: int
    tpot_ms: float
    itl_ms: float
    itl_p95_ms: float
    ttft_ms: float
    output_tokens_per_s: float
    active_experts: float | None
    active_experts_base: float | None
    rows_per_step: float | None


def order(policies: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Rounds, from 1, and policies in the order of their runs: a, b, c, a, b, c, ..."""
    return itertools.product(range(1, rounds + 1), policies)


async def measure(
    target: Target,
    policies: Sequence[str],
    prompts: Sequence[str],
    settings: Settings,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> list[Run]:
    """Run the client under every policy in every round.

    Args:
        prompts: texts of the warm-up requests.
        folder: where the client's results and output go.
        say: called before each run with what comes.

    Raises:
        EngineError: the client is missing, or the server ended or does not answer.
        BenchError: the client or a request failed, another policy was applied than the one that
            was asked for, or other traffic was counted.
    """
    if importlib.util.find_spec("sglang") is None:
        raise EngineError(f"SGLang's benchmark client is missing; run: {INSTALL_SGLANG}")
    runs = []
    for number, policy in order(policies, settings.rounds):
        say(f"round {number} of {settings.rounds}: {policy}")
        try:
            runs.append(await _run(target, policy, number, prompts, settings, folder))
        except (httpx.HTTPError, openai.APIError) as error:
            target.check()
            raise EngineError(f"no answer from {target.url} under {policy}: {error}") from error
        except BenchError:
            target.check()  # if the server has ended, that is the reason
            raise
    return runs


async def _run(
    target: Target,
    policy: str,
    number: int,
    prompts: Sequence[str],
    settings: Settings,
    folder: Path,
) -> Run:
    await _warm_up(target, policy, prompts, settings)
    output = folder / f"{number}-{policy}.jsonl"
    output.unlink(missing_ok=True)  # the client appends
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=_TIMEOUT_S) as http:
        before = await read_counts(http)
        command = client_command(target, policy, settings, seed=number, output=output)
        await _call(command, target.api_key, output.with_suffix(".log"))
        after = await read_counts(http)
    figures = parse_output(output.read_text() if output.exists() else "", settings)
    active = mean_active_experts(before, after)
    return Run(
        policy=policy,
        round=number,
        **figures,
        active_experts=active.final if active else None,
        active_experts_base=active.base if active else None,
        rows_per_step=rows_per_step(before, after, settings) if before and after else None,
    )


async def _warm_up(target: Target, policy: str, prompts: Sequence[str], settings: Settings) -> None:
    client = LoadClient(target.url, header=target.header, api_key=target.api_key)
    jobs = [Job(prompts[i % len(prompts)], policy) for i in range(settings.concurrency)]
    load = await client.run(jobs, max_tokens=WARM_UP_TOKENS)
    for answer in load.answers:
        if answer.applied != policy:
            raise BenchError(
                f"the server applied {answer.applied or 'no policy'!r} to a request for {policy!r}"
            )


def client_command(
    target: Target, policy: str, settings: Settings, *, seed: int, output: Path
) -> list[str]:
    """Command line of SGLang's client for one run.

    The prompts depend on `seed` alone, so that a round has the same ones under each policy. They
    are token ids, which need no download, all of one length, like the answers. There are no warm-up
    requests, which would be counted; the prefix cache is emptied.
    """
    return [
        *(sys.executable, "-m", _MODULE),
        *("--backend", "sglang", "--base-url", target.url.rstrip("/")),
        *("--model", target.tokenizer, "--tokenizer", target.tokenizer),
        *("--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1"),
        *("--random-input-len", str(settings.input_len)),
        *("--random-output-len", str(settings.output_len)),
        *("--num-prompts", str(settings.num_prompts)),
        *("--max-concurrency", str(settings.concurrency)),
        *("--temperature", str(settings.temperature), "--seed", str(seed)),
        *("--header", f"{target.header}={policy}"),
        *("--warmup-requests", "0", "--flush-cache", "--disable-tqdm"),
        *("--output-details", "--output-file", str(output)),
    ]


async def _call(command: Sequence[str], api_key: str, log: Path) -> None:
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "OPENAI_API_KEY": api_key},
            stdout=stream,
            stderr=stream,
            stdin=asyncio.subprocess.DEVNULL,
        )
        try:
            status = await process.wait()
        except BaseException:  # cancelled: leave no client behind
            process.kill()
            raise
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BenchError(f"SGLang's benchmark client ended with status {status}:\n{tail}")


def parse_output(text: str, settings: Settings) -> dict[str, float]:
    """Figures from the result file of one run of the client.

    Raises:
        BenchError: there is no result, a request failed, or an answer was too short.
    """
    try:
        (line,) = text.splitlines()
        result = json.loads(line)
        errors = [error for error in result["errors"] if error]
        lengths = result["output_lens"]
        figures = {ours: float(result[theirs]) for ours, theirs in _FIGURES.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"SGLang's benchmark client wrote no result that can be read: {error!r}"
        ) from error
    if errors or result["completed"] != settings.num_prompts:
        first = errors[0].strip().splitlines()[-1] if errors else "no reason given"
        failed = settings.num_prompts - result["completed"]
        raise BenchError(f"{failed} of {settings.num_prompts} requests failed: {first}")
    if set(lengths) != {settings.output_len}:
        raise BenchError(
            f"answers of {min(lengths)} to {max(lengths)} tokens instead of {settings.output_len}"
        )
    return figures


def rows_per_step(before: Mapping[str, int], after: Mapping[str, int], settings: Settings) -> float:
    """Mean live rows of a decode step between two readings of the counts.

    Raises:
        BenchError: other rows were counted than those of the run. A step more for each request
            is allowed: an overlapping scheduler may start it before it sees the end.
    """
    rows = after["rows"] - before["rows"]
    expected = after["layers"] * settings.num_prompts * (settings.output_len - 1)
    if not expected <= rows <= expected + after["layers"] * settings.num_prompts:
        raise BenchError(
            f"the server counted {rows} decode rows where the run has {expected}; was there other "
            "traffic, a retraction, or a batch that mixed prefill and decode?"
        )
    return rows / (after["calls"] - before["calls"])


def summary(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per policy: medians over rounds, distances between quartiles, saving beside vanilla.

    `tpot_saving_percent` is the median over rounds of 100 (1 - TPOT / TPOT of vanilla in the same
    round): what drifts between rounds cancels. None without vanilla.
    """
    vanilla = {run.round: run.tpot_ms for run in runs if run.policy == VANILLA}
    found: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(run.policy for run in runs):
        own = [run for run in runs if run.policy == policy]
        columns = {name: [asdict(run)[name] for run in own] for name in _COLUMNS}
        columns["tpot_saving_percent"] = [
            100 * (1 - run.tpot_ms / vanilla[run.round]) if vanilla else None for run in own
        ]
        found[policy] = {"runs": len(own)}
        for name, values in columns.items():
            known = [value for value in values if value is not None]
            found[policy][name] = round(statistics.median(known), 3) if known else None
            found[policy][f"{name}_spread"] = round(_spread(known), 3) if known else None
    return found


_COLUMNS = ("active_experts", "active_experts_base", "rows_per_step", *_FIGURES)


def _spread(values: Sequence[float]) -> float:
    """Distance between the quartiles; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]
