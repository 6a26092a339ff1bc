"""Two ranks that share every layer, and two replicas that share nothing but the HTTP server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_moe_routing import demo, environment
from sglang_moe_routing.evaluation.forced import ForcedDecoder, server_flags
from sglang_moe_routing.evaluation.measure import Evaluation, Setting, batches
from sglang_moe_routing.text import load_tokenizer, read_text
from tests.parallel import ParallelForward

from .conftest import Running
from .test_evaluate import (
    BATCH_SIZE,
    LOSS,
    NUM_SEQUENCES,
    NUM_STEPS,
    POLICIES,
    PREFIX_LEN,
    TEXTS,
    artifact_of,
    write_config,
)
from .test_routing import POLICIES as RANK_POLICIES
from .test_routing import answers_alone, check_all, distinct, generate_all

TP_FLAGS = ["--tp", "2", "--dtype", "float32", *server_flags(BATCH_SIZE, PREFIX_LEN)]


@pytest.fixture(scope="module")
def parallel(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Two tensor-parallel ranks under every kind of policy, ready for `evaluate`."""
    config = write_config(tmp_path_factory.mktemp("config"))
    with start(config, *TP_FLAGS, **{environment.FORCE: "1"}) as running:
        yield running


def record_mixed(running: Running, policies: Sequence[str]) -> list[dict[str, Any]]:
    """Calls while one request per policy runs, all at once; each must say that it followed it."""
    answers: list[dict[str, Any]] = []
    calls = running.record(lambda: answers.extend(generate_all(running.url, policies)))
    assert [answer["meta_info"]["moe_routing_policy"] for answer in answers] == list(policies)
    return calls


def by_process(calls: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Calls of every scheduler process, in its order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for call in calls:
        found.setdefault(call["pid"], []).append({k: v for k, v in call.items() if k != "pid"})
    return list(found.values())


def read_counts(running: Running) -> list[dict[str, int]]:
    """Sums over layers, of every scheduler that answers."""
    data = running.http.get("/v1/moe_routing/statistics").json()["data"]
    names = ("calls", "rows", "active_experts", "active_experts_base")
    return [{name: sum(layer[name] for layer in one["layers"]) for name in names} for one in data]


def counts_of(calls: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the statistics must say of recorded calls."""
    return {
        "calls": len(calls),
        "rows": sum(len(call["rows"]) for call in calls),
        "active_experts": sum(distinct(call["final_ids"], call["rows"]) for call in calls),
        "active_experts_base": sum(distinct(call["base_ids"], call["rows"]) for call in calls),
    }


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def test_ranks_make_the_same_calls_under_every_kind_of_policy(parallel: Running) -> None:
    """Same rows, ids and weights, bit for bit; rank 0's counts are those of one rank."""
    names = [
        "vanilla",
        "oea-c",
        "topk-c",
        "budget-mapped",
        "by-rows",
        "xshare",
        "lynx-c",
        "sere-fitted",
    ]
    assert len(names) <= BATCH_SIZE  # all at once
    (before,) = read_counts(parallel)
    calls = record_mixed(parallel, names)
    (after,) = read_counts(parallel)
    first, second = by_process(calls)
    assert first == second
    assert any(set(call["rows"]) == set(names) for call in first)
    assert difference(after, before) == counts_of(first)


@pytest.mark.parametrize("name", ["vanilla", "oea-k2", "sere-s2", "budget-mapped"])
def test_evaluate_measures_the_same_with_two_ranks(parallel: Running, name: str) -> None:
    """Losses and T are those of a plain forward of the whole model in one process."""
    text = read_text(
        TEXTS,
        load_tokenizer(demo.MODEL),
        num_sequences=NUM_SEQUENCES,
        sequence_length=PREFIX_LEN + 1 + NUM_STEPS,
        seed=3,
    )
    with ForcedDecoder(parallel.url) as decoder:
        evaluation = Evaluation(decoder, text, PREFIX_LEN)
        order = batches(text, Setting(BATCH_SIZE), evaluation.seed).flatten()
        measured = evaluation.measure(name, Setting(BATCH_SIZE))
    forward = ParallelForward(demo.MODEL, batch_size=BATCH_SIZE, prefix_len=PREFIX_LEN)
    policy = POLICIES[name]
    losses, active = forward.run(text.token_ids[order], policy, artifact_of(policy))
    assert float((measured.losses[order].mean(dim=1) - losses).abs().max()) < LOSS
    assert float(measured.active.mean()) == pytest.approx(active, abs=0.1)


def test_vanilla_requests_are_bit_identical_to_a_plain_tensor_parallel_server(
    start: Callable[..., Any], parallel: Running
) -> None:
    """In text and log-probabilities."""
    with start(None, *TP_FLAGS) as plain:
        expected = answers_alone(plain.url)
    assert answers_alone(parallel.url) == expected


@pytest.mark.parametrize("ep_size", [1, 2])
def test_ranks_route_alike_and_as_the_oracle_says(
    start: Callable[..., Any], config: Path, similarity: dict[int, np.ndarray], ep_size: int
) -> None:
    """Tensor-parallel ranks hold a part of every expert, expert-parallel ones half of the experts
    whole; their ids become local ones after the re-routing."""
    with start(config, "--tp", "2", "--ep-size", str(ep_size)) as running:
        calls = record_mixed(running, RANK_POLICIES)
        assert running.http.get("/server_info").json()["ep_size"] == ep_size
    first, second = by_process(calls)
    assert first == second
    assert set(check_all(first, similarity)) == set(RANK_POLICIES)


def test_replicas_route_and_count_by_themselves(
    start: Callable[..., Any], config: Path, similarity: dict[int, np.ndarray]
) -> None:
    """Data parallelism without DP attention: own batches, unions and statistics."""
    names = ["vanilla", "oea-k3", "topk-k3", "sere-s2"] * 4
    with start(config, "--dp-size", "2") as running:
        before = read_counts(running)
        calls = record_mixed(running, names)
        after = read_counts(running)
    check_all(calls, similarity)
    counted = [difference(*pair) for pair in zip(after, before, strict=True)]
    recorded = [counts_of(replica) for replica in by_process(calls)]
    assert len(recorded) == 2
    assert sorted(map(str, counted)) == sorted(map(str, recorded))
