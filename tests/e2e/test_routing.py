"""What the engine really ran, recorded, and held to the oracle."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from sglang_moe_routing import demo, environment
from sglang_moe_routing.testing import oracle
from tests.recorded import check_recorded

from .conftest import HEADER, Running, rule_of

POLICIES = ("vanilla", "oea-k3", "oea-k2", "topk-k3", "sere-s2", "late")
EVERY_KIND = (*POLICIES, "budget-20", "xshare-24", "lynx-24", "mapped")


def generate_all(
    url: str, policies: Iterable[str], max_new_tokens: int = 12, **extra: Any
) -> list[dict[str, Any]]:
    """One prompt per policy, temperature 0, full length.

    All in one request: however busy the machine, they share batches.
    """
    prompts = demo.read_prompts()
    params = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    asked = list(enumerate(policies))
    body = {
        "text": [prompts[i % len(prompts)] for i, _ in asked],
        "rid": [f"{i}-{name}-{np.random.default_rng().integers(1 << 60)}" for i, name in asked],
        "sampling_params": [
            {**params, "custom_params": {"moe_routing_policy": name}} for _, name in asked
        ],
        **extra,
    }
    response = httpx.post(f"{url}/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return list(response.json())


def check_all(calls: list[dict[str, Any]], similarity: dict[int, np.ndarray]) -> Counter[str]:
    """Hold every call to the oracle; how many rows of each policy there were."""
    for call in calls:
        if call["requests"]:
            for rid, name in zip(call["requests"], call["rows"], strict=True):
                assert name in ("vanilla", rid_policy(rid)), (rid, name)
    return check_recorded(calls, rule_of, similarity)


def rid_policy(rid: str) -> str:
    return rid.split("-", 1)[1].rsplit("-", 1)[0]


def distinct(ids: list[list[int]], rows: list[str | None]) -> int:
    held = {e for row, name in zip(ids, rows, strict=True) if name for e in row}
    return len(held - {oracle.FREE})


def test_mixed_policies_share_batches_and_obey_the_oracle(
    served: Running, similarity: dict[int, np.ndarray]
) -> None:
    calls = served.record(lambda: generate_all(served.url, EVERY_KIND * 2))
    rows = check_all(calls, similarity)
    assert set(rows) == set(EVERY_KIND)
    assert all(rows[name] >= 2 * 11 * 4 for name in EVERY_KIND)  # requests x decode steps x layers
    assert max(len(call["rows"]) for call in calls) == 20
    assert any(len(set(call["rows"])) == len(EVERY_KIND) for call in calls)
    assert {call["phase"] for call in calls} == {"DECODE"}


@pytest.mark.parametrize("name", ["oea-k3", "sere-s2"])
def test_fewer_experts_are_active(served: Running, name: str) -> None:
    calls = served.record(lambda: generate_all(served.url, [name] * 16))
    full = [call for call in calls if len(call["rows"]) == 16]
    final = sum(distinct(call["final_ids"], call["rows"]) for call in full)
    base = sum(distinct(call["base_ids"], call["rows"]) for call in full)
    assert final <= 0.75 * base


def num_moved(call: dict[str, Any]) -> int:
    """Slots of the router's choice whose expert the row no longer uses."""
    rows = zip(call["base_ids"], call["final_ids"], strict=True)
    return sum(expert not in final for base, final in rows for expert in base)


def num_critical(call: dict[str, Any]) -> int:
    """Active experts outside the union."""
    active = {e for final in call["final_ids"] for e in final} - {oracle.FREE}
    return len(active - set(call["union"]))


def read_statistics(running: Running) -> dict[str, Any]:
    (data,) = running.http.get("/v1/moe_routing/statistics").json()["data"]
    return dict(data)


def check_statistics(running: Running) -> None:
    before = read_statistics(running)["layers"]
    calls = running.record(lambda: generate_all(running.url, POLICIES))
    after = read_statistics(running)["layers"]
    for start, end in zip(before, after, strict=True):
        mine = [call for call in calls if call["layer"] == end["layer"]]
        expected = {
            "calls": len(mine),
            "rows": sum(len(call["rows"]) for call in mine),
            "active_experts": sum(distinct(call["final_ids"], call["rows"]) for call in mine),
            "active_experts_base": sum(distinct(call["base_ids"], call["rows"]) for call in mine),
            "moved_slots": sum(map(num_moved, mine)),
            "critical_experts": sum(map(num_critical, mine)),
        }
        assert {name: end[name] - start[name] for name in expected} == expected


def test_statistics_equal_what_was_recorded(served: Running) -> None:
    check_statistics(served)


def test_compiled_kernels_serve(served: Running) -> None:
    statistics = read_statistics(served)
    assert statistics["kernels"].startswith("cpu ")
    assert statistics["experts"] == statistics["kernels"]


def test_without_kernels_and_compiler_the_reference_serves_and_says_why(
    start: Callable[..., Any], config: Path, tmp_path: Path, similarity: dict[int, np.ndarray]
) -> None:
    """The same promises as with compiled kernels."""
    with start(config, CXX="no-such-compiler", SGLANG_MOE_ROUTING_CACHE=str(tmp_path)) as running:
        reason = "no C++ compiler 'no-such-compiler' on PATH"
        assert read_statistics(running)["kernels"] == f"torch reference: {reason}"
        assert read_statistics(running)["experts"] == "torch"
        calls = running.record(lambda: generate_all(running.url, EVERY_KIND * 2))
        assert set(check_all(calls, similarity)) == set(EVERY_KIND)
        check_statistics(running)


def test_policy_of_all_phases_reroutes_the_prompt(
    served: Running, similarity: dict[int, np.ndarray]
) -> None:
    served.http.post("/flush_cache")
    calls = served.record(lambda: generate_all(served.url, ["everywhere"], max_new_tokens=2))
    check_all(calls, similarity)
    assert {call["phase"] for call in calls} == {"EXTEND", "DECODE"}
    prefill = [call for call in calls if call["phase"] == "EXTEND"]
    assert set(prefill[0]["rows"]) == {"everywhere"}
    assert any(call["final_ids"] != call["base_ids"] for call in prefill)


def test_prompts_of_decode_policies_stay_exact(served: Running) -> None:
    """With one token to generate there is no decode step: every policy gives vanilla's logits."""
    texts = {
        name: generate_all(served.url, [name], 1, return_logprob=True)[0]["meta_info"]
        for name in ("vanilla", "topk-k3", "sere-s2")
    }
    logprobs = {name: info["output_token_logprobs"] for name, info in texts.items()}
    assert logprobs["topk-k3"] == logprobs["sere-s2"] == logprobs["vanilla"]


def test_prefix_cache_is_isolated_per_definition(served: Running) -> None:
    prompt = "A prefix cache test needs a prompt that no other test sends, of some length."

    def cached(policy: str, text: str = prompt) -> tuple[int, str]:
        params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        body = {"text": text, "sampling_params": params}
        answer = served.http.post("/generate", json=body, headers={HEADER: policy}).json()
        return answer["meta_info"]["cached_tokens"], text + answer["text"]

    served.http.post("/flush_cache")
    fresh, _ = cached("vanilla")
    again, _ = cached("vanilla")
    assert again > fresh + 8
    assert cached("oea-k3")[0] == 0, "vanilla KV must not serve another policy"

    served.http.post("/flush_cache")
    _, conversation = cached("oea-k3")
    assert cached("oea-k3", conversation)[0] > again, "a policy reuses its own earlier turns"
    assert cached("same-as-oea-k3", conversation)[0] > again, "an equal definition shares KV"
    assert cached("vanilla", conversation)[0] == 0, "KV of a policy must not serve vanilla"
    assert cached("topk-k3", conversation)[0] == 0, "nor another policy"


def test_users_cache_key_still_separates(served: Running) -> None:
    served.http.post("/flush_cache")
    body = {
        "text": "Words that only this test sends. " * 3,
        "sampling_params": {"max_new_tokens": 1},
    }
    headers = {HEADER: "oea-k3"}
    keys = ["tenant-a", "tenant-a", "tenant-b"]
    answers = [
        served.http.post("/generate", json={**body, "extra_key": key}, headers=headers).json()
        for key in keys
    ]
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    assert cached[1] > cached[0]
    assert cached[2] < cached[1]


@pytest.fixture(scope="module")
def stressed(start: Callable[..., Any], config: Path) -> Iterator[Running]:
    """Chunked prefill, mixed chunks, retraction, returned routed experts, and forced tokens."""
    flags = (
        "--chunked-prefill-size",
        "32",
        "--enable-mixed-chunk",
        "--enable-return-routed-experts",
    )
    with start(config, *flags, **{environment.FORCE: "1", "SGLANG_TEST_RETRACT": "1"}) as running:
        yield running


def test_mixed_chunks_and_retraction_keep_rows_right(
    stressed: Running, similarity: dict[int, np.ndarray]
) -> None:
    answers: list[dict[str, Any]] = []
    calls = stressed.record(
        lambda: answers.extend(generate_all(stressed.url, POLICIES * 2, max_new_tokens=16))
    )
    rows = check_all(calls, similarity)
    assert set(rows) == set(POLICIES)
    assert {"MIXED", "DECODE"} <= {call["phase"] for call in calls}
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0


def test_forced_tokens_survive_retraction_and_chunks(stressed: Running) -> None:
    """The text dictates every token, and each is scored once, whatever steps were thrown away."""
    texts = [[100 * i + j for j in range(64)] for i in range(1, 9)]
    sampling = [
        {
            "max_new_tokens": 24,
            "temperature": 0.0,
            "ignore_eos": True,
            "custom_params": {environment.FORCED_TOKENS: text[40:]},
        }
        for text in texts
    ]
    body = {"input_ids": [text[:40] for text in texts], "sampling_params": sampling}
    answers = stressed.http.post("/generate", json=body).json()
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    assert [answer["output_ids"] for answer in answers] == [text[40:] for text in texts]
    scored = [answer["meta_info"][environment.FORCED_TOKENS] for answer in answers]
    assert [len(scores) for scores in scored] == [24] * len(texts)


@pytest.mark.parametrize("policy", ["vanilla", "topk-k3", "oea-k3", "sere-s2"])
def test_returned_routed_experts_replay_those_that_ran(stressed: Running, policy: str) -> None:
    """As replay in training does: ids to gather by, and the mask of a token's experts."""
    answers: list[dict[str, Any]] = []
    calls = stressed.record(
        lambda: answers.extend(generate_all(stressed.url, [policy], 4, return_routed_experts=True))
    )
    info = answers[0]["meta_info"]
    returned = np.frombuffer(base64.b64decode(info["routed_experts"]), dtype=np.int32)
    returned = returned.reshape(-1, 4, 8)  # [tokens, layers, top_k]
    decode = [call for call in calls if call["phase"] == "DECODE"]
    steps = [decode[i : i + 4] for i in range(0, len(decode), 4)]
    ran = np.array([[call["final_ids"][0] for call in step] for step in steps])
    logits = np.array([[call["router_logits"][0] for call in step] for step in steps])
    replayed = returned[-len(ran) :]
    assert policy != "topk-k3" or (ran == -1).any()

    assert replayed.shape == ran.shape
    assert replayed.min() >= 0
    mask = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(mask, replayed, True, axis=2)  # raises for an id above the experts
    for step, layer in np.ndindex(ran.shape[:2]):
        row = ran[step, layer]
        assert set(mask[step, layer].nonzero()[0]) == set(row[row >= 0])
        assert (replayed[step, layer][row < 0] == row[0]).all()


def test_a_trainer_with_the_experts_that_ran_has_the_rollouts_log_probabilities(
    stressed: Running,
) -> None:
    """As the example does it; the server computes in bfloat16, the trainer in float32."""
    script = Path(__file__).parents[2] / "examples" / "replay_routed_experts.py"
    run = subprocess.run(
        [sys.executable, str(script), str(demo.MODEL), stressed.url, "topk-k3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    own, replayed = map(float, re.findall(r"off by ([\d.]+) nats", run.stdout))
    assert replayed < 0.02
    assert own > 5 * replayed


@pytest.fixture(scope="module")
def graphed(start: Callable[..., Any], config: Path) -> Iterator[Running]:
    """SGLang's decode graph runner with buckets, re-executing instead of replaying."""
    flags = (
        "--enable-torch-compile",
        "--cuda-graph-backend-prefill",
        "disabled",
        "--cuda-graph-bs-decode",
        *("1", "2", "4", "8", "16"),
    )
    with start(config, *flags, SGLANG_MOE_ROUTING_EMULATE_GRAPHS="1") as running:
        yield running


def test_graph_padding_adds_no_expert(graphed: Running, similarity: dict[int, np.ndarray]) -> None:
    calls = graphed.record(lambda: generate_all(graphed.url, POLICIES[:5] * 2 + ("late",)))
    rows = check_all(calls, similarity)
    assert set(rows) == set(POLICIES)
    assert {call["phase"] for call in calls} == {"GRAPH"}
    padded = [call for call in calls if None in call["rows"]]
    assert padded
    assert {len(call["rows"]) for call in calls} <= {1, 2, 4, 8, 16}
    for call in padded:
        padding = [row for row, n in zip(call["final_ids"], call["rows"], strict=True) if not n]
        assert {e for row in padding for e in row} == {oracle.FREE}


def test_padding_is_neutral_for_an_all_vanilla_batch(graphed: Running) -> None:
    calls = graphed.record(lambda: generate_all(graphed.url, ["vanilla"] * 5, 48))
    padded = [call for call in calls if call["rows"].count(None) == 3]
    assert padded
    for call in padded:
        assert call["final_ids"][:5] == call["base_ids"][:5]
        assert call["final_weights"][:5] == call["base_weights"][:5]
        assert {e for row in call["final_ids"][5:] for e in row} == {oracle.FREE}
        assert {w for row in call["final_weights"][5:] for w in row} == {0.0}


def answers_alone(url: str) -> list[Any]:
    """Text and log-probabilities of requests that run one at a time, from an empty cache."""
    httpx.post(f"{url}/flush_cache", timeout=60)
    found = []
    for prompt in demo.read_prompts()[:6]:
        body = {
            "text": prompt,
            "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 4,
            "logprob_start_len": 0,
        }
        answer = httpx.post(f"{url}/generate", json=body, timeout=300).json()
        names = ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs")
        found.append((answer["text"], *(answer["meta_info"][name] for name in names)))
    return found


def test_vanilla_only_server_is_bit_identical_to_one_without_hooks(
    plain: Running, served: Running
) -> None:
    """In text and log-probabilities, same MoE forward."""
    assert httpx.get(f"{plain.url}/v1/moe_routing/policies").status_code == 404
    assert answers_alone(served.url) == answers_alone(plain.url)


def tokens_and_logprobs(response: dict[str, Any]) -> list[tuple[float, int]]:
    """Log-probability and id of each generated token."""
    return [(entry[0], entry[1]) for entry in response["meta_info"]["output_token_logprobs"]]


def generate_one(url: str, number: int, **extra: Any) -> dict[str, Any]:
    """The request that `generate_all` sends as number `number`, under vanilla and by itself."""
    prompts = demo.read_prompts()
    response = httpx.post(
        f"{url}/generate",
        json={
            "text": prompts[number % len(prompts)],
            "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True},
            **extra,
        },
        headers={HEADER: "vanilla"},
        timeout=300,
    )
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


def test_a_vanilla_request_gives_the_same_text_whoever_shares_its_batch(served: Running) -> None:
    """Alone it gives, bit for bit, what it gives beside re-routed ones; in bfloat16."""
    batch = ["vanilla", "oea-k2", "vanilla", "sere-s2", "topk-k3", "vanilla", "oea-k3", "late"] * 2
    served.http.post("/flush_cache")
    together = generate_all(served.url, batch, return_logprob=True)
    assert len({tuple(tokens_and_logprobs(r)) for r in together}) > 4
    for i, policy in enumerate(batch):
        if policy != "vanilla" or i % 2:
            continue
        served.http.post("/flush_cache")
        alone = generate_one(served.url, i, return_logprob=True)
        assert tokens_and_logprobs(alone) == tokens_and_logprobs(together[i])
