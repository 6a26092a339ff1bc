"""The table of hooked symbols against the installed sglang, and how drift is reported."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sglang_moe_routing.errors import EngineError

hooking = pytest.importorskip("sglang_moe_routing.engine.hooking")
from sglang_moe_routing import environment  # noqa: E402
from sglang_moe_routing.config import LoadedConfig, load_config  # noqa: E402
from sglang_moe_routing.integration import install  # noqa: E402
from sglang_moe_routing.integration.hooks import HOOKS, RELIED_ON  # noqa: E402

TOPK = "sglang.srt.layers.moe.topk"


def test_installed_sglang_is_what_we_hook_into() -> None:
    findings = hooking.verify([*HOOKS, *RELIED_ON])
    assert [f for f in findings if not f.ok] == []


def test_every_target_is_hooked_once() -> None:
    targets = [hook.target for hook in HOOKS]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize(
    ("target", "parameters", "problem"),
    [
        (f"{TOPK}.no_such", None, "not found in this sglang"),
        ("sglang.no_such_module.x", None, "not found in this sglang"),
        (f"{TOPK}.capture_routed_experts_if_allowed", ("a",), "expected (a)"),
    ],
)
def test_drift_is_found(target: str, parameters: tuple[str, ...] | None, problem: str) -> None:
    (finding,) = hooking.verify([hooking.Symbol(target, parameters)])
    assert not finding.ok
    assert problem in finding.problem


def test_problems_are_refused_with_their_remedy() -> None:
    findings = hooking.verify([hooking.Symbol(f"{TOPK}.no_such")])
    with pytest.raises(EngineError, match=r"topk.no_such not found[^$]*Reinstall sglang==0.5.23"):
        hooking.refuse_problems(findings)


def test_other_sglang_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooking, "version", lambda name: "0.5.24")
    with pytest.raises(EngineError, match=r"sglang 0.5.24 is installed.*written for 0.5.23"):
        hooking.check_version()


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
