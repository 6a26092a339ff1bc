"""``evaluate``: what policies cost in quality and save in active experts, on the real engine."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from .. import environment
from ..config import VANILLA, LoadedConfig, load_config
from ..errors import BenchError, EngineError, TextError
from ..evaluation.forced import ForcedDecoder, server_flags
from ..evaluation.measure import Evaluation
from ..evaluation.pairs import parse_pairs
from ..evaluation.report import Row, rows_of, write_report
from ..evaluation.run import Result, cases, check_cases, run
from ..policies import Policy
from ..serving.load import wanted_policies
from ..serving.machine import describe_machine
from ..serving.server import running_server
from ..text import TokenizedText, load_tokenizer, read_text
from .options import Cpu, Policies
from .output import (
    Json,
    check_matplotlib,
    clear_errors,
    command_line,
    console,
    dense_table,
    errors,
    numbers,
    print_json,
    say,
    showing_start,
)

Model = Annotated[str, typer.Argument(help="Model folder or name.")]
Data = Annotated[
    list[str],
    typer.Option(help="Text, JSONL or Parquet files, or data sets; repeatable.", metavar="SOURCE"),
]
PrefixLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens that are scored after each prompt.")]
NumSequences = Annotated[int, typer.Option(min=1, help="Sequences, from all sources together.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of sequences and their batches.")]
TextColumn = Annotated[str, typer.Option(help="Column of a table that holds the text.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the tokenizer brings.")
]


@dataclass(frozen=True)
class Sampling:
    """Which sequences are measured, and how they are cut."""

    prefix_len: int
    max_tokens: int
    num_sequences: int
    seed: int


def evaluate(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the report.", file_okay=False)],
    routing_config: Annotated[Path, typer.Option(help="Routing config (YAML).")],
    policies: Policies = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences per batch.")] = "1,4,8,16,32",
    prefix_len: PrefixLen = 64,
    max_tokens: MaxTokens = 96,
    num_sequences: NumSequences = 160,
    same_domain: Annotated[
        bool, typer.Option("--same-domain", help="Also measure batches of one source each.")
    ] = False,
    vanilla_share: Annotated[
        float,
        typer.Option(min=0.0, max=0.99, help="Also measure batches with such a vanilla share."),
    ] = 0.0,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="Two measured policies to compare; repeatable.", metavar="A:B"),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Result of bench serve, to show TPOT beside quality.")
    ] = None,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    trust_remote_code: TrustRemoteCode = False,
    cpu: Cpu = None,
    json: Json = False,
) -> None:
    """Decode text under each policy, token by token as the text says; score every next token.

    Options after -- go to SGLang's server, for example -- --dtype float32 --tp 2.
    """
    check_matplotlib("the report")
    with clear_errors(), ExitStack() as stack:
        loaded = load_config(routing_config)
        names = wanted_policies(policies, loaded.config.choosable)
        sizes = sorted(set(numbers(batch_sizes, "--batch-sizes")))
        to_compare = parse_pairs(pairs or (), dict.fromkeys((VANILLA, *names)))
        times = read_bench(bench)
        sampling = Sampling(prefix_len, max_tokens, num_sequences, seed)
        text = tokenized(model, data, sampling, text_column, trust_remote_code)
        wanted = list(cases(names, sizes, same_domain=same_domain, vanilla_share=vanilla_share))
        check_cases(text, seed, wanted)
        out.mkdir(parents=True, exist_ok=True)
        settings = {
            "data": [Path(source).name for source in data],
            "text_sha256": text.sha256,
            "batch_sizes": sizes,
            **asdict(sampling),
            "vanilla_share": vanilla_share,
            "server_options": context.args,
        }
        result = Result(out / "results.json", header(model, settings), to_compare)
        status = stack.enter_context(errors.status("starting the server"))
        evaluation = stack.enter_context(
            measuring(
                model,
                routing_config,
                text,
                sampling,
                batch_size=max(sizes),
                flags=context.args,
                cpu=cpu,
                log=out / "server.log",
                status=status,
            )
        )
        with keeping_partial(result):
            run(evaluation, wanted, result, status.update)
    families = families_of(loaded)
    write_report(result.as_json(), families, out, times)
    if json:
        print_json(result.as_json())
    else:
        print_rows(rows_of(result.as_json(), families, times))
        print_pairs(result.compared)
    say(f"report: {out / 'report.html'}", to=errors)


def read_bench(file: Path | None) -> Mapping[str, Any] | None:
    """Figures of every policy that ``bench serve`` timed. Raises `BenchError` if it has none."""
    if file is None:
        return None
    try:
        policies = json_module.loads(file.read_text(encoding="utf-8"))["policies"]
        return {name: {"tpot_ms": found["tpot_ms"]} for name, found in policies.items()}
    except OSError as error:
        raise BenchError(f"--bench {file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchError(f"--bench {file}: is no result of bench serve --json") from None


def tokenized(
    model: str, data: Sequence[str], sampling: Sampling, column: str, trust_remote_code: bool
) -> TokenizedText:
    """The text to measure on. Raises `TextError`, also if it does not suit the model."""
    text = read_text(
        data,
        load_tokenizer(model, trust_remote_code),
        num_sequences=sampling.num_sequences,
        sequence_length=sampling.prefix_len + 1 + sampling.max_tokens,
        seed=sampling.seed,
        column=column,
    )
    _check_vocabulary(model, int(text.token_ids.max()), trust_remote_code)
    return text


def _check_vocabulary(model: str, largest: int, trust_remote_code: bool) -> None:
    size = _model_config(model, trust_remote_code).vocab_size
    if largest >= size:
        raise TextError(
            f"{model}: its tokenizer makes token {largest}, its vocabulary has {size}: the "
            "tokenizer is another model's"
        )


def _model_config(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise TextError(f"{model}: no usable model config: {error}") from None
    return config.get_text_config()


def model_sizes(model: str, trust_remote_code: bool) -> tuple[int, int]:
    """Routed experts and experts per token of the model's MoE layers.

    Raises:
        TextError: the model's config cannot be read.
        BenchError: it names no such sizes.
    """
    config = _model_config(model, trust_remote_code)
    num_experts = _first(config, "num_experts", "n_routed_experts", "num_local_experts")
    top_k = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    if num_experts is None or top_k is None:
        raise BenchError(f"{model}: its config names no number of experts, or none per token")
    return num_experts, top_k


def normalizes(model: str, trust_remote_code: bool) -> bool:
    """Whether a token's weights sum to one: unless its config says otherwise.

    Raises:
        TextError: the model's config cannot be read.
    """
    return bool(getattr(_model_config(model, trust_remote_code), "norm_topk_prob", True))


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def header(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says besides its figures."""
    return {
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "settings": dict(settings),
        "machine": describe_machine(),
        "command": command_line(),
    }


@contextmanager
def measuring(
    model: str,
    routing_config: Path,
    text: TokenizedText,
    sampling: Sampling,
    *,
    batch_size: int,
    flags: Sequence[str],
    cpu: bool | None,
    log: Path,
    status: Status,
) -> Iterator[Evaluation]:
    """A server that forces tokens, and everything to measure policies on it."""
    with (
        running_server(
            model,
            config=routing_config,
            flags=[*server_flags(batch_size, sampling.prefix_len), *flags],
            environment={environment.FORCE: "1"},
            log=log,
            cpu=cpu,
            on_wait=showing_start(status),
        ) as server,
        ForcedDecoder(server.url, server.check) as decoder,
    ):
        yield Evaluation(decoder, text, sampling.prefix_len, sampling.seed)


@contextmanager
def keeping_partial(result: Result) -> Iterator[None]:
    """Say where partial results lie if the measurement ends early."""
    try:
        yield
    except (EngineError, BenchError) as error:
        kept = f"; what was measured is in {result.file}, marked as partial"
        raise type(error)(f"{error}{kept if result.figures else ''}") from error


def families_of(loaded: LoadedConfig) -> dict[str, str]:
    """Policies by what they have in common: a curve of the report."""
    config = loaded.config
    named = zip(config.names, config.definitions, strict=True)
    return {name: _family(policy, config.artifact_of(name)) for name, policy in named}


def _family(policy: Policy, artifact: str | None) -> str:
    compensation = getattr(policy, "compensation", None)
    parts = [policy.kind]
    if artifact is not None:
        parts.append(artifact if policy.kind == "sere" else "mapping")
    if compensation is not None:
        parts.append(f"c = {compensation:g}")
    return ", ".join(parts)


def print_rows(rows: Sequence[Row]) -> None:
    """One table of policies for each section."""
    columns = ("batch", "CE", "delta", "95 % interval", "agree %", "T", "T\nbase")
    for section, mine in _by_section(rows):
        table = dense_table(section, "policy", columns)
        for row in mine:
            table.add_row(row["policy"], *_cells(row))
        console.print(table)


def print_pairs(compared: Sequence[Mapping[str, Any]]) -> None:
    """One table of paired differences for each section."""
    columns = ("batch", "CE", "95 % interval", "T", "T\nsecond", "")
    for section, mine in _by_section(compared):
        table = dense_table(f"pairs of {section}", "first\n- second", columns)
        for row in mine:
            table.add_row(f"{row['first']}\n- {row['second']}", *_pair_cells(row))
        console.print(table)


def _by_section(rows: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    for section in dict.fromkeys(row["section"] for row in rows):
        yield section.replace("_", " "), [row for row in rows if row["section"] == section]


def _cells(row: Row) -> Iterator[str]:
    yield str(row["batch_size"])
    yield f"{row['cross_entropy']:.4f}"
    yield f"{row['delta']:+.4f}"
    yield f"{row['ci_low']:+.4f} {row['ci_high']:+.4f}"
    yield f"{100 * row['agreement']:.1f}"
    yield f"{row['active_experts']:.2f}"
    yield f"{row['active_experts_base']:.2f}"


def _pair_cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield str(row["batch_size"])
    yield f"{row['difference']:+.4f}"
    yield "{:+.4f} {:+.4f}".format(*row["ci95"])
    yield f"{row['active_experts_first']:.2f}"
    yield f"{row['active_experts_second']:.2f}"
    yield "" if row["told_from_0"] else "not told from 0"
