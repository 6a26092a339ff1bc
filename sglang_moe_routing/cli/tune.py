"""``tune``: the policy with the fewest active experts within a bound on cross-entropy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..artifacts import load_artifact
from ..config import load_config
from ..errors import BenchError, ConfigError
from ..evaluation.measure import Evaluation
from ..evaluation.tune import (
    KINDS,
    Trial,
    Tuning,
    candidates,
    check_sizes,
    definition_of,
    families,
    halves,
)
from ..evaluation.tune import tune as search_and_confirm
from .evaluate import (
    Data,
    MaxTokens,
    Model,
    NumSequences,
    PrefixLen,
    Sampling,
    Seed,
    TextColumn,
    TrustRemoteCode,
    header,
    measuring,
    model_sizes,
    normalizes,
    tokenized,
)
from .options import Cpu
from .output import Json, clear_errors, errors, numbers, print_json, say

ARTIFACT = "calibrated"


def tune(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Routing config to write.", dir_okay=False)],
    max_ce_increase: Annotated[
        float, typer.Option(min=0.0, help="Largest increase of the cross-entropy, as a share.")
    ] = 0.01,
    batch_sizes: Annotated[str, typer.Option(help="Sequences per batch.")] = "4,16",
    kinds: Annotated[
        str, typer.Option(help=f"Kinds to try, of {', '.join(KINDS)}.")
    ] = "budget,oea,sere",
    similarity: Annotated[
        Path | None,
        typer.Option(help="Similarity artifact; lets weights be mapped, and sere be tried."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the policy.")] = "tuned",
    prefix_len: PrefixLen = 64,
    max_tokens: MaxTokens = 64,
    num_sequences: NumSequences = 160,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    trust_remote_code: TrustRemoteCode = False,
    cpu: Cpu = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a config that is there already.")
    ] = False,
    json: Json = False,
) -> None:
    """Search policies on one half of the text, confirm on the other, write a routing config.

    Options after -- go to SGLang's server.
    """
    with clear_errors(), ExitStack() as stack:
        _check_out(out, overwrite)
        sizes = sorted(set(numbers(batch_sizes, "--batch-sizes")))
        check_sizes(num_sequences, sizes)
        metric = None if similarity is None else load_artifact(similarity).metric
        found = families(
            *model_sizes(model, trust_remote_code),
            _kinds(kinds),
            normalizes=normalizes(model, trust_remote_code),
            metric=metric,
        )
        sampling = Sampling(prefix_len, max_tokens, num_sequences, seed)
        text = tokenized(model, data, sampling, text_column, trust_remote_code)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-routing-tune-")))
        config = work / "candidates.yaml"
        config.write_text(yaml.safe_dump(_config(candidates(found), similarity, work)))
        load_config(config)  # a fault shows before the server starts
        status = stack.enter_context(errors.status("starting the server"))
        first, second = halves(text)
        search = stack.enter_context(
            measuring(
                model,
                config,
                first,
                sampling,
                batch_size=max(sizes),
                flags=context.args,
                cpu=cpu,
                log=work / "server.log",
                status=status,
            )
        )
        confirm = Evaluation(search.decoder, second, prefix_len, seed)
        trials: list[Trial] = []

        def report(trial: Trial) -> None:
            trials.append(trial)
            status.update(f"{len(trials)} tried; last {_line(trial)}")

        tuning = search_and_confirm(search, confirm, found, sizes, max_ce_increase, report)
        settings = {
            "data": [Path(source).name for source in data],
            "text_sha256": text.sha256,
            "max_ce_increase": max_ce_increase,
            **asdict(sampling),
            "server_options": context.args,
        }
        about = header(model, settings)
        written = write_config(tuning, about, name, similarity, out)
    say(f"wrote {out}; serve it with --routing-config {out}", to=errors)
    if json:
        print_json({**about, **written})
    else:
        typer.echo(out.read_text(encoding="utf-8"), nl=False)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out}: is there already; add --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise BenchError(f"--kinds: {kind!r} cannot be tuned; choose of {', '.join(KINDS)}")
    return kinds


def _config(policies: Mapping[str, Any], similarity: Path | None, folder: Path) -> dict[str, Any]:
    """A routing config that lies in `folder`."""
    config: dict[str, Any] = {"version": 1}
    if similarity is not None and any(map(_needs_similarity, policies.values())):
        relative = os.path.relpath(similarity.absolute(), folder.absolute())
        config["similarity"] = {ARTIFACT: relative}
    return {**config, "policies": dict(policies)}


def _needs_similarity(definition: Mapping[str, Any]) -> bool:
    return definition["kind"] == "sere" or "mapped_share" in definition


def write_config(
    tuning: Tuning,
    about: Mapping[str, Any],
    name: str,
    similarity: Path | None,
    out: Path,
) -> dict[str, Any]:
    """Write the tuned config, its evidence in comments; the same as JSON values."""
    policies = {name: definition_of(tuning)}
    config = _config(policies, similarity, out.parent)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in evidence(tuning, about))
    body = yaml.safe_dump(config, sort_keys=False)
    out.write_text(comments + "\n" + body, encoding="utf-8")
    load_config(out)
    return {
        "policy": policies[name],
        "confirmed": [asdict(trial) for trial in tuning.confirmed],
        "raised": tuning.raised,
        "trials": [asdict(trial) for trial in tuning.trials],
        "config": str(out),
    }


def evidence(tuning: Tuning, about: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say what the tuned policy rests on."""
    settings, machine = about["settings"], about["machine"]
    yield f"Written by: {about['command']}"
    yield (
        f"Model {about['model']}; sglang {machine['versions']['sglang']}; "
        f"{machine['accelerator'] or machine['processor']}; text {settings['text_sha256'][:12]}"
    )
    yield (
        f"Bound: cross-entropy at most {settings['max_ce_increase']:.2%} over vanilla. Policies "
        "were chosen on one"
    )
    yield "half of the text, with one standard error to spare; below is the other, unseen half."
    yield ""
    yield "batch  over vanilla  95 % interval       limit   T       T of vanilla  share"
    for trial in tuning.confirmed:
        yield (
            f"{trial.batch_size:<6} {trial.delta.mean:+.4f}       "
            f"{trial.delta.low:+.4f} {trial.delta.high:+.4f}     {trial.limit:.4f}  "
            f"{trial.active:<7.2f} {trial.active_base:<13.2f} "
            f"{trial.active / trial.active_base:.1%}"
        )
    if tuning.raised:
        sizes = ", ".join(map(str, sorted(set(tuning.raised))))
        yield f"Raised after the unseen half broke the bound, so no longer quite unseen: {sizes}"
    yield ""
    yield "Best of every family on the first half (value, over vanilla, T):"
    yield from _best_lines(tuning.trials)
    yield ""
    yield "In force at the batch sizes that were measured, and between them."


def _best_lines(trials: Sequence[Trial]) -> Iterator[str]:
    for family in dict.fromkeys(trial.family for trial in trials):
        for size in sorted({trial.batch_size for trial in trials}):
            safe = [
                trial
                for trial in trials
                if trial.family == family and trial.batch_size == size and trial.is_safe
            ]
            best = min(safe, key=lambda trial: trial.active, default=None)
            yield f"  batch {size}: {_line(best) if best else family + ': none tried is safe'}"


def _line(trial: Trial) -> str:
    return f"{trial.family} {trial.value}, {trial.delta.mean:+.4f}, {trial.active:.2f}"
