"""The KV namespace of a request in the scheduler, in the keys that SGLang makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.utils import storage_namespace_seed
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_moe_routing import runtime
from sglang_moe_routing.config import load_config
from sglang_moe_routing.integration.hooks.scheduler import request
from sglang_moe_routing.integration.transport import Choice, pack
from sglang_moe_routing.runtime import process

POLICIES = """
policies:
  fast: {kind: oea, k0: 3}
  also-fast: {kind: oea, k0: 3}
  other: {kind: topk, k0: 2}
"""
GROUPS = "isolation: {policies: {other: tenant}}\n"


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    path = folder / "routing.yaml"
    path.write_text(f"version: 1\n{more}{POLICIES}")
    monkeypatch.setattr(process, "_current", None)
    runtime.start(load_config(path))


def namespace(policy: str, group: str = "default", **given: str) -> tuple[Any, Any]:
    """What SGLang keys KV by beside its tokens."""
    params = SamplingParams(custom_params=pack(None, Choice(policy, group)))
    req = Req.__new__(Req)
    request.around(Req.__init__, req, "id", "text", [1, 2, 3], params, **given)
    assert req.to_finish is None, req.to_finish
    return req.extra_key, req.cache_salt


def test_policies_salt_their_kv_and_leave_the_clients_key_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, monkeypatch)
    key, salt = namespace("fast", extra_key="mine")
    assert key == "mine"
    assert salt.startswith("moe-routing:")
    assert namespace("also-fast", extra_key="mine") == (key, salt)
    assert namespace("other", extra_key="mine")[1] != salt


def test_a_vanilla_request_has_the_namespace_of_stock_sglang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, monkeypatch)
    assert namespace("vanilla") == (None, None)
    assert namespace("vanilla", extra_key="a", cache_salt="b") == ("a", "b")


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_no_client_can_name_the_namespace_of_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    start(tmp_path, monkeypatch)
    _, salt = namespace("fast")
    forged = [salt, f"|{salt}", "moe-routing:", f"moe-routing:|{salt}", "default|", "|", "x"]
    seen = {
        storage_namespace_seed(*namespace(policy, **given))
        for policy in ("vanilla", "fast", "other")
        for given in ({}, *({field: text} for text in forged))
    }
    assert len(seen) == 3 * (1 + len(forged))


def test_isolation_groups_share_no_kv_of_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, monkeypatch, GROUPS)
    assert namespace("fast", "default") != namespace("fast", "tenant")
    assert namespace("vanilla", "default") == namespace("vanilla", "tenant") == (None, None)


def test_a_shared_cache_is_shared_within_an_isolation_group_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vanilla requests too: they may read what a policy wrote."""
    start(tmp_path, monkeypatch, GROUPS + "prefix_cache: shared\n")
    for group in ("default", "tenant"):
        assert namespace("vanilla", group) == namespace("fast", group) == namespace("other", group)
    assert namespace("vanilla", "default") != namespace("vanilla", "tenant")
    assert namespace("vanilla", "default", cache_salt="a") != namespace("vanilla", "default")


def test_a_shared_cache_without_groups_is_that_of_stock_sglang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, monkeypatch, "prefix_cache: shared\n")
    assert namespace("fast") == namespace("vanilla") == (None, None)
