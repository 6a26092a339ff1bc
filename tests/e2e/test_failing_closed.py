"""A server that cannot serve what its config says must not serve at all."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts.models import make_tiny_models
from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import (
    free_port,
    server_command,
    server_environment,
    stop_server,
)

SITECUSTOMIZE = '''
"""Changes one SGLang module as it is imported: `SABOTAGE=module:statement`."""
import importlib.util, os, sys

module, _, statement = os.environ["SABOTAGE"].partition(":")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(loaded):
            load(loaded)
            exec(statement, vars(loaded))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
'''

GOOD = "version: 1\npolicies:\n  fast: {kind: oea, k0: 3}\n"


def failed_start(
    folder: Path,
    config: str,
    *flags: str,
    sabotage: str = "",
    model: Path = demo.MODEL,
    **environment: str,
) -> tuple[int, str]:
    """Start SGLang's own server and wait for it to end; its exit status and output."""
    path = folder / "routing.yaml"
    path.write_text(config)
    base = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if sabotage:
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        base |= {"PYTHONPATH": str(folder), "SABOTAGE": sabotage}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server_command(str(model), ["--port", str(free_port()), *flags]),
            env=server_environment(path, cpu=True, base=base),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout=300)
    finally:
        stop_server(process)
    return status, log.read_text()


def own_message(output: str) -> str:
    start = output.find("sglang-moe-routing:")
    assert start >= 0, output[-3000:]
    return output[start : start + 1500]


def test_misspelled_key_stops_the_server(tmp_path: Path) -> None:
    status, output = failed_start(tmp_path, GOOD.replace("policies", "polices"))
    assert status == 78
    assert "routing.yaml:2: polices: unknown key, did you mean 'policies'?" in own_message(output)


def test_renamed_symbol_and_changed_signature_stop_the_server(tmp_path: Path) -> None:
    status, output = failed_start(
        tmp_path,
        GOOD,
        sabotage="sglang.srt.layers.moe.topk:_renamed = _post_process_topk_ids; "
        "del _post_process_topk_ids; build_precomputed_topk_output = lambda ids, extra: 0",
    )
    assert status == 78
    message = own_message(output)
    assert "sglang.srt.layers.moe.topk._post_process_topk_ids not found" in message
    assert "has no parameter 'topk_weights' at place 0, which the hook reads" in message
    assert f"sglang=={version('sglang')}" in message


def test_removed_hook_stops_the_server(tmp_path: Path) -> None:
    status, output = failed_start(
        tmp_path,
        GOOD,
        sabotage="sglang.srt.plugins.hook_registry:_register = HookRegistry.register; "
        "HookRegistry.register = lambda target, *a, **k: "
        "None if target.endswith('Req.__init__') else _register(target, *a, **k)",
    )
    assert status == 78
    message = own_message(output)
    assert "routing hooks were not applied: sglang.srt.managers.schedule_batch.Req" in message


def test_missing_artifact_stops_the_server(tmp_path: Path) -> None:
    config = (
        "version: 1\nsimilarity: {main: none.safetensors}\n"
        "policies: {s: {kind: sere, num_primary: 2}}\n"
    )
    status, output = failed_start(tmp_path, config)
    assert status == 78
    assert f"{tmp_path}/none.safetensors: no such similarity artifact" in own_message(output)


def test_unsupported_flags_stop_the_server_before_it_spawns_anything(tmp_path: Path) -> None:
    status, output = failed_start(tmp_path, GOOD, "--tokenizer-worker-num", "2")
    assert status == 78
    assert "--tokenizer-worker-num 2: extra HTTP workers do not load" in own_message(output)
    assert "Load weight begin" not in output


def test_artifact_of_other_weights_stops_the_server(tmp_path: Path) -> None:
    """The same model trained further has the same layers and experts, and other neighbours."""
    from sglang_moe_routing import load_artifact, save_artifact
    from sglang_moe_routing.checkpoint import fingerprint, read_headers

    served = fingerprint(read_headers(demo.MODEL))
    mine = load_artifact(demo.CONFIG.with_name("similarity.safetensors"))
    tuned = replace(mine, fingerprint=replace(served, weights="0" * 64))
    save_artifact(tuned, tmp_path / "tuned.safetensors")
    config = (
        "version: 1\nsimilarity: {main: tuned.safetensors}\n"
        "policies: {s: {kind: sere, num_primary: 2}}\n"
    )
    status, output = failed_start(tmp_path, config)
    assert status == 78
    message = own_message(output)
    assert f"was made for other weights than {demo.MODEL}: fingerprint 000000000000" in message
    assert f"served {served.weights[:12]}" in message
    assert "set similarity.main.allow_other_weights: true" in message


def test_kernels_that_cannot_be_built_stop_the_server(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = str(tmp_path / "cache")
    status, output = failed_start(tmp_path, GOOD, CXX=str(compiler), SGLANG_MOE_ROUTING_CACHE=cache)
    assert status == 78
    message = own_message(output)
    assert f"compiling the cpu kernels in {cache}" in message
    assert "this compiler is broken" in message


def test_unknown_runner_of_the_experts_stops_the_server(tmp_path: Path) -> None:
    status, output = failed_start(tmp_path, GOOD, SGLANG_MOE_ROUTING_CPU_EXPERTS="fast")
    assert status == 78
    assert "'fast' is not one of auto, native, torch" in own_message(output)


def test_compiled_experts_that_cannot_be_had_stop_the_server(tmp_path: Path) -> None:
    status, output = failed_start(
        tmp_path,
        GOOD,
        SGLANG_MOE_ROUTING_KERNELS="torch",
        SGLANG_MOE_ROUTING_CPU_EXPERTS="native",
    )
    assert status == 78
    message = own_message(output)
    assert "CPU_EXPERTS=native, but SGLANG_MOE_ROUTING_KERNELS=torch" in message


def test_dense_model_stops_the_server(tmp_path: Path) -> None:
    import shutil

    transformers = pytest.importorskip("transformers")
    model = tmp_path / "dense"
    shutil.copytree(demo.MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = transformers.Qwen3Config.from_pretrained(demo.MODEL)
    config.architectures = ["Qwen3ForCausalLM"]
    transformers.Qwen3ForCausalLM(config).save_pretrained(model)
    status, output = failed_start(tmp_path, GOOD, model=model)
    assert status == 78
    assert "Qwen3ForCausalLM has no MoE layers that SGLang routes" in own_message(output)


def test_routed_layers_without_experts_in_the_checkpoint_stop_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang ignores `decoder_sparse_step`: it would serve experts that nobody loaded."""
    family = make_tiny_models.FAMILIES["qwen3_moe"]
    sparse = replace(family, settings={**family.settings, "decoder_sparse_step": 2})
    monkeypatch.setitem(make_tiny_models.FAMILIES, "sparse", sparse)
    model = make_tiny_models.make("sparse", tmp_path / "sparse")
    status, output = failed_start(tmp_path, GOOD, "--dtype", "float32", model=model)
    assert status == 78
    message = own_message(output)
    assert "SGLang made layers [0, 2] of Qwen3MoeForCausalLM MoE layers" in message
    assert "It ignores decoder_sparse_step and mlp_only_layers" in message


SKIPS_FOUR_ROWS = """
import functools

@functools.wraps(_inner := select_experts)
def select_experts(hidden_states, router_logits, topk_config, **options):
    if hidden_states.shape[0] != 4:
        return _inner(hidden_states, router_logits, topk_config, **options)
    weights, ids = router_logits.softmax(dim=-1).topk(topk_config.top_k)
    return StandardTopKOutput(weights, ids.int(), router_logits)
"""


def test_a_graph_of_one_size_that_bypasses_the_router_stops_the_server(tmp_path: Path) -> None:
    """As kernels do that replace a model's forward for the sizes that they cover."""
    flags = ("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-bs-decode", "1", "4", "8")
    status, output = failed_start(
        tmp_path,
        GOOD,
        "--enable-torch-compile",
        *flags,
        sabotage=f"sglang.srt.layers.moe.topk:{SKIPS_FOUR_ROWS}",
        SGLANG_MOE_ROUTING_EMULATE_GRAPHS="1",
    )
    assert status == 78
    message = own_message(output)
    assert "in the decode graph of 4 requests, MoE layers [0, 1, 2, 3] of 4" in message
    assert "another plugin that skips or replaces a function of SGLang's router" in message
    assert "Traceback" not in output.split("sglang-moe-routing:")[0]
