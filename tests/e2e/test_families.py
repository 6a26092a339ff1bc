"""Every model family on the real server: mixed policies, each recorded call held to the oracle."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_moe_routing import environment
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.serving.server import running_server
from tests.recorded import check_call

from .conftest import HEADER, Running

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "models" / "make_tiny_models.py"

CONFIG = """
version: 1
similarity: {random: {path: SIMILARITY, allow_other_weights: true}}
policies:
  oea-k1: {kind: oea, k0: 1}
  oea-p: {kind: oea, k0: 2, p: 0.3, k_max: 2}
  topk-k1: {kind: topk, k0: 1}
  sere-s1: {kind: sere, num_primary: 1, threshold: 0.6}
"""

ORACLE: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "vanilla"},
    "oea-k1": {"kind": "oea", "k0": 1},
    "oea-p": {"kind": "oea", "k0": 2, "p": 0.3, "k_max": 2},
    "topk-k1": {"kind": "topk", "k0": 1},
    "sere-s1": {"kind": "sere", "S": 1, "rho": 0.6},
}

NUM_TOKENS = 12

TRITON_ATTENTION = ("--attention-backend", "triton", "--triton-attention-num-kv-splits", "1")


@dataclass(frozen=True)
class Expected:
    """What a family needs to serve, and what router attaching to it must find.

    Attributes:
        layers: ids of its MoE layers.
        router: entries of the recorded router.
    """

    layers: tuple[int, ...]
    router: dict[str, Any]
    flags: tuple[str, ...] = ()


SOFTMAX = {"scoring": "softmax", "renormalize": True, "scale": 1.0, "bias": None, "num_groups": 1}
GROUPS = {"num_groups": 4, "top_groups": 2}

FAMILIES = {
    "qwen3_moe": Expected((0, 1, 2), SOFTMAX),
    "qwen2_moe": Expected((0, 1, 2), {**SOFTMAX, "renormalize": False}),
    "mixtral": Expected((0, 1, 2), {**SOFTMAX, "top_k": 2}),
    "olmoe": Expected((0, 1, 2), {**SOFTMAX, "renormalize": False}),
    "glm4_moe": Expected((1, 2), {"scoring": "sigmoid", "renormalize": True, "num_groups": 1}),
    "deepseek_v2": Expected((1, 2), {**SOFTMAX, **GROUPS, "renormalize": False}),
    "deepseek_v3": Expected((1, 2), {"scoring": "sigmoid", "renormalize": True, **GROUPS}),
    "gpt_oss": Expected(
        (0, 1, 2), SOFTMAX, flags=(*TRITON_ATTENTION, "--moe-runner-backend", "triton")
    ),
}
"""Attention sinks (GPT-OSS) are beyond the torch_native backend."""

BIASED = {"glm4_moe", "deepseek_v3"}


def prompt(i: int) -> str:
    return f"Once upon a time, {i}"


@dataclass(frozen=True)
class Family:
    """A running server of one family."""

    name: str
    model: Path
    server: Running
    similarity: dict[int, np.ndarray]

    @property
    def expected(self) -> Expected:
        return FAMILIES[self.name]

    def generate(self, policies: list[str]) -> list[httpx.Response]:
        """One request per policy, all at once."""
        params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}

        async def send_all() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.server.url, timeout=300) as http:
                requests = (
                    http.post(
                        "/generate",
                        json={"text": prompt(i), "sampling_params": params},
                        headers={HEADER: policy},
                    )
                    for i, policy in enumerate(policies)
                )
                return await asyncio.gather(*requests)

        return asyncio.run(send_all())


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The script that writes tiny checkpoints."""
    spec = importlib.util.spec_from_file_location("make_tiny_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, scripts: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    """One server after the other, each on its own checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    model = scripts.make(request.param, folder / request.param)
    artifact = scripts.make_similarity(model, folder / "similarity.safetensors")
    config = folder / "routing.yaml"
    config.write_text(CONFIG.replace("SIMILARITY", str(artifact)))
    records = folder / "records"
    matrices = load_artifact(artifact).matrices
    with running_server(
        model,
        config=config,
        flags=["--dtype", "float32", "--random-seed", "0", *FAMILIES[request.param].flags],
        environment={"OMP_NUM_THREADS": "1", environment.RECORD: str(records)},
        log=folder / "server.log",
        cpu=True,
    ) as server:
        yield Family(
            request.param,
            model,
            Running(server, records),
            {layer: matrix.float().numpy() for layer, matrix in matrices.items()},
        )


def test_mixed_policies_obey_the_oracle_on_every_family(family: Family) -> None:
    policies = [*ORACLE, "vanilla"]
    answers: list[httpx.Response] = []
    calls = family.server.record(lambda: answers.extend(family.generate(policies)))
    for policy, answer in zip(policies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        info = answer.json()["meta_info"]
        assert info["moe_routing_policy"] == policy
        assert info["completion_tokens"] == NUM_TOKENS

    rows: Counter[str] = Counter()
    rerouted: Counter[str] = Counter()
    for call in calls:
        check_call(call, ORACLE, family.similarity)
        rows.update(call["rows"])
        rerouted.update(rerouted_rows(call))
    assert tuple(sorted({call["layer"] for call in calls})) == family.expected.layers
    num_rows = (NUM_TOKENS - 1) * len(family.expected.layers)  # prefill gives the first token
    assert all(rows[name] == num_rows for name in ORACLE if name != "vanilla")
    assert rows["vanilla"] == 2 * num_rows
    assert rerouted["vanilla"] == 0
    assert rerouted["topk-k1"] == num_rows
    assert rerouted["oea-k1"] + rerouted["oea-p"] + rerouted["sere-s1"] > 0
    assert any(len(set(call["rows"])) > 1 for call in calls), "no policies met in one batch"


def rerouted_rows(call: dict[str, Any]) -> list[str]:
    """Policy of every row of a call whose experts changed."""
    rows = zip(call["rows"], call["base_ids"], call["final_ids"], strict=True)
    return [name for name, base, final in rows if base != final]


@pytest.mark.parametrize("policy", ["oea-k1", "sere-s1"])
def test_alone_in_a_batch_a_policy_reroutes(family: Family, policy: str) -> None:
    """Without other rows there is next to nothing to piggyback on or to keep."""
    calls = family.server.record(lambda: family.generate([policy]))
    for call in calls:
        check_call(call, ORACLE, family.similarity)
    rerouted = sum(bool(rerouted_rows(call)) for call in calls)
    assert rerouted == len(calls) if policy == "oea-k1" else rerouted > 0


def test_attached_router_is_that_of_the_family(family: Family) -> None:
    calls = family.server.record(lambda: family.generate(["oea-k1"]))
    router = calls[0]["router"]
    expected = family.expected.router
    assert {name: router[name] for name in expected} == expected
    assert router["num_experts"] == next(iter(family.similarity.values())).shape[0]
    assert (router["bias"] is not None) == (family.name in BIASED)
    if router["bias"]:
        assert len(set(router["bias"])) == router["num_experts"]


def test_rows_follow_the_bias_of_an_update(family: Family, tmp_path: Path) -> None:
    if family.name not in BIASED:
        pytest.skip("the router of this family has no bias")
    policies = ["vanilla", "oea-k1", "topk-k1"]
    old = family.server.record(lambda: family.generate(policies))[0]["router"]["bias"]
    other = tmp_path / "other"
    shutil.copytree(family.model, other)
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, {"format": "pt"})

    def update(model: Path) -> None:
        body = {"model_path": str(model)}
        answer = family.server.http.post("/update_weights_from_disk", json=body)
        assert answer.status_code == 200, answer.text

    update(other)
    try:
        calls = family.server.record(lambda: family.generate(policies))
    finally:
        update(family.model)
    assert calls[0]["router"]["bias"] == old[::-1]
    for call in calls:
        check_call(call, ORACLE, family.similarity)


def test_vanilla_beside_others_generates_what_transformers_does(family: Family) -> None:
    """The engine on this platform runs the family's model, whoever shares the batch."""
    answer, *_ = family.generate(["vanilla", "oea-k1", "sere-s1", "topk-k1"])
    assert answer.json()["output_ids"] == continue_greedily(family.model, prompt(0))


def continue_greedily(model: Path, text: str) -> list[int]:
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    given = tokens.shape[1]
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            best = network(tokens).logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens[0, given:].tolist()
