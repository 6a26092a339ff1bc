"""`evaluate` and `tune` on a real server, held to a parallel forward of the plain model."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from sglang_moe_routing import demo, environment
from sglang_moe_routing.artifacts import SimilarityArtifact, load_artifact, save_artifact
from sglang_moe_routing.config import load_config
from sglang_moe_routing.errors import BenchError, EngineError
from sglang_moe_routing.evaluation.forced import ForcedDecoder, server_flags
from sglang_moe_routing.evaluation.measure import Evaluation, Setting, batches
from sglang_moe_routing.policies import Policy, builtin_registry
from sglang_moe_routing.serving.server import running_server
from sglang_moe_routing.text import TokenizedText, load_tokenizer, read_text
from tests.parallel import ParallelForward

ROOT = Path(__file__).parents[2]
TEXTS = [str(ROOT / "docs" / "concepts.md"), str(ROOT / "docs" / "cli.md")]
PREFIX_LEN, NUM_STEPS, BATCH_SIZE, NUM_SEQUENCES = 24, 20, 8, 16
SIMILARITY = demo.CONFIG.with_name("similarity.safetensors")

SERE: dict[str, Any] = {
    "kind": "sere",
    "num_primary": 2,
    "threshold": -1.0,
    "similarity": "demo",
}
DEFINITIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "vanilla"},
    "oea-k2": {"kind": "oea", "k0": 2},
    "sere-s2": SERE,
    "budget": {"kind": "budget", "max_active": 20},
    "budget-mapped": {
        "kind": "budget",
        "max_active": 20,
        "mapped_share": 0.3,
        "similarity": "demo",
    },
    "by-rows": {"kind": "oea", "k0": {"default": 4, "rows": {4: 2}}},
    "oea-c": {"kind": "oea", "k0": 2, "compensation": 0.6},
    "topk-c": {"kind": "topk", "k0": 2, "compensation": 0.4},
    "xshare": {"kind": "xshare", "max_active": 16},
    "lynx-c": {"kind": "lynx", "max_active": 20, "compensation": 0.6},
    "sere-c": {**SERE, "compensation": 0.4},
    "sere-fitted": {**SERE, "similarity": "fitted"},
}
POLICIES: dict[str, Policy] = {
    name: builtin_registry()[definition["kind"]].model_validate(definition)
    for name, definition in DEFINITIONS.items()
}

LOSS = 2e-3
"""Largest difference of a sequence's mean loss, but where float32 kernels, which round otherwise
than torch's, decide a near tie of experts the other way."""
NEAR_TIE = 0.03
"""Largest difference there. A tie in the demand of a budget touches all sequences of its batch."""


def write_config(folder: Path) -> Path:
    """A config of all policies, and the artifact with coefficients that one of them uses."""
    save_artifact(fitted(), folder / "fitted.safetensors")
    similarity = {"demo": str(SIMILARITY), "fitted": "fitted.safetensors"}
    file = folder / "routing.yaml"
    config = {"version": 1, "similarity": similarity, "policies": DEFINITIONS}
    file.write_text(yaml.safe_dump(config))
    return file


def fitted() -> SimilarityArtifact:
    """The demo's artifact as if it had coefficients, which differ from pair to pair."""
    demo_artifact = load_artifact(SIMILARITY)
    generator = torch.Generator().manual_seed(0)
    coefficients = {
        layer: torch.rand(matrix.shape, generator=generator).fill_diagonal_(1)
        for layer, matrix in demo_artifact.matrices.items()
    }
    return replace(demo_artifact, metric="least_squares", coefficients=coefficients)


def artifact_of(policy: Policy) -> SimilarityArtifact | None:
    name = getattr(policy, "similarity", None)
    return {None: None, "demo": load_artifact(SIMILARITY), "fitted": fitted()}[name]


@pytest.fixture(scope="module")
def text() -> TokenizedText:
    return read_text(
        TEXTS,
        load_tokenizer(demo.MODEL),
        num_sequences=NUM_SEQUENCES,
        sequence_length=PREFIX_LEN + 1 + NUM_STEPS,
        seed=3,
    )


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("evaluate")
    with running_server(
        demo.MODEL,
        config=write_config(folder),
        flags=[*server_flags(BATCH_SIZE, PREFIX_LEN), "--dtype", "float32"],
        environment={environment.FORCE: "1"},
        log=folder / "log",
        cpu=True,
    ) as server:
        yield server.url


@pytest.fixture(scope="module")
def evaluation(server_url: str, text: TokenizedText) -> Iterator[Evaluation]:
    with ForcedDecoder(server_url) as decoder:
        yield Evaluation(decoder, text, PREFIX_LEN)


@pytest.fixture(scope="module")
def parallel() -> ParallelForward:
    return ParallelForward(demo.MODEL, batch_size=BATCH_SIZE, prefix_len=PREFIX_LEN)


@pytest.mark.parametrize("name", POLICIES)
def test_losses_are_those_of_a_parallel_forward(
    name: str, evaluation: Evaluation, text: TokenizedText, parallel: ParallelForward
) -> None:
    setting = Setting(BATCH_SIZE)
    order = batches(text, setting, evaluation.seed).flatten()
    measured = evaluation.measure(name, setting)
    policy = POLICIES[name]
    losses, active = parallel.run(text.token_ids[order], policy, artifact_of(policy))
    differences = (measured.losses[order].mean(dim=1) - losses).abs().view(-1, BATCH_SIZE)
    assert float(differences.amax(dim=1).min()) < LOSS  # of the two batches, one has no near tie
    assert float(differences.max()) < NEAR_TIE
    assert float(measured.active.mean()) == pytest.approx(active, abs=0.1)


def test_best_tokens_are_the_models_own(evaluation: Evaluation, text: TokenizedText) -> None:
    """Where the model likes the true token best, its loss is below that of a coin."""
    measured = evaluation.vanilla(Setting(BATCH_SIZE))
    truth = text.token_ids[:, PREFIX_LEN + 1 :]
    is_right = measured.best == truth
    assert 0.1 < float(is_right.double().mean()) < 0.9
    assert (measured.losses[measured.losses < math.log(2)] >= 0).all()
    assert is_right[measured.losses < math.log(2)].all()  # more than half of the mass


def test_batches_of_one_source_are_another_order(evaluation: Evaluation) -> None:
    mixed = evaluation.vanilla(Setting(BATCH_SIZE))
    same = evaluation.vanilla(Setting(BATCH_SIZE, grouping="same"))
    assert float((mixed.losses - same.losses).mean(dim=1).abs().max()) < LOSS
    assert not torch.equal(mixed.active, same.active)


def test_vanilla_rows_of_a_mixed_batch_stay(evaluation: Evaluation) -> None:
    vanilla = evaluation.vanilla(Setting(BATCH_SIZE))
    mixed = evaluation.measure("oea-k2", Setting(BATCH_SIZE, vanilla_share=0.5))
    assert int(mixed.follows.sum()) == NUM_SEQUENCES // 2
    change = (mixed.losses - vanilla.losses).mean(dim=1).abs()
    assert float(change[~mixed.follows].max()) < LOSS
    assert float(change[mixed.follows].max()) > 10 * LOSS
    alone = evaluation.measure("oea-k2", Setting(BATCH_SIZE))
    assert alone.active.mean() < mixed.active.mean() < vanilla.active.mean()


def test_an_engine_that_splits_the_batch_is_an_error(
    evaluation: Evaluation, text: TokenizedText
) -> None:
    too_many = text.token_ids[: 2 * BATCH_SIZE]
    with pytest.raises(BenchError, match="--max-running-requests"):
        evaluation.decoder.run(too_many, PREFIX_LEN, ["vanilla"] * len(too_many))


def test_a_policy_that_the_server_lacks_is_an_error(
    evaluation: Evaluation, text: TokenizedText
) -> None:
    with pytest.raises(EngineError, match="unknown MoE routing policy 'nosuch'"):
        evaluation.decoder.run(text.token_ids[:2], PREFIX_LEN, ["nosuch"] * 2)


def test_an_ordinary_server_forces_nothing(served: Any, text: TokenizedText) -> None:
    with ForcedDecoder(served.url) as decoder, pytest.raises(EngineError, match="does not force"):
        decoder.run(text.token_ids[:2], PREFIX_LEN, ["vanilla"] * 2)


def command(name: str, *options: str) -> list[str]:
    data = [part for source in TEXTS for part in ("--data", source)]
    lengths = ["--prefix-len", str(PREFIX_LEN), "--max-tokens", "8", "--num-sequences", "16"]
    return [
        *(sys.executable, "-m", "sglang_moe_routing", name, str(demo.MODEL)),
        *(*data, *lengths, "--cpu", *options, "--", "--dtype", "float32"),
    ]


def test_evaluate_writes_its_report(tmp_path: Path) -> None:
    write_config(tmp_path)
    bench = {"policies": {"vanilla": {"tpot_ms": 9.0}, "oea-k2": {"tpot_ms": 6.0}}}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    out = tmp_path / "out"
    done = subprocess.run(
        command(
            "evaluate",
            *("--routing-config", str(tmp_path / "routing.yaml"), "--out", str(out)),
            *("--policies", "oea-k2,budget", "--batch-sizes", "1,4", "--vanilla-share", "0.5"),
            *("--same-domain", "--bench", str(tmp_path / "bench.json"), "--json"),
            *("--pairs", "budget:oea-k2", "--pairs", "oea-k2:vanilla"),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "results.json").read_text())
    assert result["complete"]
    assert set(result["policies"]) == {"vanilla", "oea-k2", "budget"}
    for section, sizes in (("policies", {"1", "4"}), ("mixed_policies", {"4"})):
        found = result[section]["oea-k2"]
        assert set(found) == sizes
        low, high = found["4"]["ci95"]
        assert low <= found["4"]["delta"] <= high
        assert found["4"]["active_experts"] < found["4"]["active_experts_base"]
    assert result["policies"]["vanilla"]["4"]["delta"] == 0
    for pair in result["pairs"]:
        first, second = (
            result[pair["section"]][pair[name]][str(pair["batch_size"])]
            for name in ("first", "second")
        )
        difference = first["cross_entropy"] - second["cross_entropy"]
        assert pair["difference"] == pytest.approx(difference, abs=1e-5)
        assert pair["active_experts_first"] == first["active_experts"]
        if pair["second"] == "vanilla":
            assert pair["ci95"] == pytest.approx(first["ci95"], abs=1e-5)
    assert len(result["pairs"]) == 2 * 2 + 2 * 2 + 1  # mixed, same domain, shared with vanilla
    assert result["vanilla_rounding"]["largest_change_of_a_sequence"] < LOSS
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["section"] for row in rows} == {"policies", "same_domain", "mixed_policies"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert (
        "http" not in re.sub(r'xmlns[^"]*"[^"]*"|<!DOCTYPE[^>]*>|href="#|rdf:[^>]*', "", page)[:500]
    )
    for picture in ("pareto", "layers", "tpot"):
        assert (out / f"{picture}.png").stat().st_size > 10_000


def test_an_engine_that_dies_leaves_partial_results(tmp_path: Path) -> None:
    write_config(tmp_path)
    out = tmp_path / "out"
    options = ("--routing-config", str(tmp_path / "routing.yaml"), "--out", str(out))
    process = subprocess.Popen(
        command("evaluate", *options, "--batch-sizes", "1,2,4,8"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    results = out / "results.json"
    while not results.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    os.killpg(child_of(process), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "marked as partial" in errors
    partial = json.loads(results.read_text())
    assert not partial["complete"]
    assert partial["policies"]["vanilla"]["1"]["delta"] == 0


def test_a_command_that_is_ended_leaves_no_server(tmp_path: Path) -> None:
    write_config(tmp_path)
    options = ("--routing-config", str(tmp_path / "routing.yaml"), "--out", str(tmp_path / "out"))
    arguments = command("evaluate", *options, "--batch-sizes", "4")
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    server = child_of(process)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(server, 0)


def child_of(process: subprocess.Popen[Any]) -> int:
    """Process id of the server that a command started; it leads its own group."""
    while True:
        assert process.poll() is None
        children = psutil.Process(process.pid).children()
        if children:
            return int(children[0].pid)
        time.sleep(0.2)


def test_tune_writes_a_config_that_keeps_the_bound(tmp_path: Path) -> None:
    out = tmp_path / "tuned.yaml"
    done = subprocess.run(
        command(
            "tune",
            *("--out", str(out), "--max-ce-increase", "0.05", "--batch-sizes", "2,8", "--json"),
            *("--kinds", "budget,oea", "--similarity", str(SIMILARITY)),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    policy = load_config(out).config.policies["tuned"]
    assert policy.kind == result["policy"]["kind"]
    assert (policy.engage.min_rows, policy.engage.max_rows) == (2, 8)
    for trial in result["confirmed"]:
        assert trial["delta"]["mean"] <= trial["limit"]
        assert trial["active"] < trial["active_base"]
    assert out.read_text().startswith("# Written by: sglang-moe-routing ")
