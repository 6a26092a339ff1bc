"""What we hook and rely on against the installed sglang, and how drift is reported."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_routing.errors import EngineError

hooking = pytest.importorskip("sglang_moe_routing.engine.hooking")
from sglang_moe_routing import environment  # noqa: E402
from sglang_moe_routing.config import LoadedConfig, load_config  # noqa: E402
from sglang_moe_routing.engine import signatures  # noqa: E402
from sglang_moe_routing.integration import install  # noqa: E402
from sglang_moe_routing.integration.hooks import HOOKS, entries  # noqa: E402

TOPK = "sglang.srt.layers.moe.topk"
CAPTURE = f"{TOPK}.capture_routed_experts_if_allowed"


@pytest.fixture(scope="module")
def release() -> Any:
    return signatures.installed_release()


def test_installed_sglang_is_what_we_hook_into(release: Any) -> None:
    findings = hooking.verify(entries(), release)
    assert [f for f in findings if not f.ok] == []


def test_every_target_is_hooked_once() -> None:
    targets = [hook.target for hook in HOOKS]
    assert len(targets) == len(set(targets))


def takes_nothing() -> None: ...


def other_name(topk_config: Any, layer: Any, topk_ids: Any) -> None: ...


def other_place(original: Any, layer_id: Any, topk_config: Any, topk_ids: Any) -> None: ...


def too_few(topk_config: Any) -> None: ...


def keyword(topk_config: Any, *args: Any, no_such: Any) -> None: ...


@pytest.mark.parametrize(
    ("target", "kind", "function", "problem"),
    [
        (CAPTURE, "before", other_name, "no parameter 'layer' at place 1"),
        (CAPTURE, "around", other_place, "no parameter 'layer_id' at place 0"),
        (CAPTURE, "before", too_few, "has the parameters layer_id, topk_ids as well"),
        (CAPTURE, "before", keyword, "no parameter 'no_such'"),
        (CAPTURE, "before", takes_nothing, "has the parameters topk_config, layer_id, topk_ids"),
        (f"{TOPK}.no_such", "before", takes_nothing, "not found in this sglang"),
        ("sglang.no_such_module.x", "before", takes_nothing, "not found in this sglang"),
    ],
)
def test_a_hook_that_misreads_its_target_is_found(
    release: Any, target: str, kind: Any, function: Any, problem: str
) -> None:
    (finding,) = hooking.verify([hooking.Hook(target, kind, function)], release)
    assert problem in finding.problem


def test_a_hook_must_do_without_what_its_target_does_without(release: Any) -> None:
    def strict(self: Any, obj: Any, request: Any) -> None: ...

    def lenient(self: Any, obj: Any, request: Any = None) -> None: ...

    target = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
    found = [
        hooking.verify([hooking.Hook(target, "before", f)], release)[0] for f in (strict, lenient)
    ]
    assert [f.problem for f in found] == [
        "may be called without 'request', which the hook reads",
        "",
    ]


def test_class_methods_hand_their_class_to_the_hook(release: Any) -> None:
    def without_cls(result: Any, batch: Any, *args: Any, **kwargs: Any) -> None: ...

    target = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
    (finding,) = hooking.verify([hooking.Hook(target, "after", without_cls)], release)
    assert "no parameter 'batch' at place 0" in finding.problem


def test_attributes_that_are_read_must_be_there(release: Any) -> None:
    symbol = hooking.Symbol(f"{TOPK}.TopK", "topk_config layer_id no_such")
    (finding,) = hooking.verify([symbol], release)
    assert finding.problem == "has no attribute no_such, which we read"


def test_problems_are_refused_with_a_diff_and_their_remedy(release: Any) -> None:
    lines = release.symbols[CAPTURE]
    changed = [line.replace("topk_ids", "ids") for line in lines]
    other = dataclasses.replace(release, symbols={**release.symbols, CAPTURE: changed})
    findings = hooking.verify([hooking.Symbol(CAPTURE)], other)
    with pytest.raises(EngineError) as error:
        hooking.refuse_problems(findings)
    message = str(error.value)
    assert f"{CAPTURE} is not what it is in sglang {release.name}" in message
    assert re.search(r"\n +-    ids.*,\n +\+    topk_ids.*,\n", message)
    assert f"sglang=={release.name}" in message.splitlines()[-1]


def test_other_sglang_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "version", lambda name: "0.5.24")
    with pytest.raises(
        EngineError, match=r"sglang 0.5.24 is installed.*0.5.22 and 0.5.23; run: pip"
    ):
        signatures.installed_release()


def loaded(tmp_path: Path) -> LoadedConfig:
    path = tmp_path / "routing.yaml"
    path.write_text("version: 1\n")
    return load_config(path)


def test_worker_accepts_the_config_that_the_main_process_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded(tmp_path)
    monkeypatch.setenv(environment.CONFIG_SHA256, hashlib.sha256(b"version: 1\n").hexdigest())
    install._check_unchanged(config)


def test_worker_refuses_a_config_that_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded(tmp_path)
    monkeypatch.setenv(environment.CONFIG_SHA256, "0" * 64)
    with pytest.raises(EngineError, match="changed while the server was starting"):
        install._check_unchanged(config)
