"""Policy ids across reloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_routing.config import LoadedConfig, load_config
from sglang_moe_routing.integration.definitions import VANILLA_ID, PolicyIds, define


class Request:
    """Something that uses a policy until it is garbage."""


def load(folder: Path, policies: str, more: str = "") -> LoadedConfig:
    path = folder / "routing.yaml"
    path.write_text(f"version: 1\n{more}\npolicies: {{{policies}}}\n")
    return load_config(path)


def reload(ids: PolicyIds, loaded: LoadedConfig) -> None:
    definitions = define(loaded, {})
    ids.adopt(ids.with_config(definitions), definitions)


@pytest.fixture
def ids(tmp_path: Path) -> PolicyIds:
    return PolicyIds(define(load(tmp_path, "a: {kind: oea, k0: 3}, b: {kind: topk, k0: 2}"), {}))


def test_place_is_the_id(ids: PolicyIds) -> None:
    assert ids.of_name == {"vanilla": VANILLA_ID, "a": 1, "b": 2}
    assert [d.name for d in ids.table] == ["vanilla", "a", "b"]


def test_unchanged_definitions_keep_their_ids(ids: PolicyIds, tmp_path: Path) -> None:
    reload(ids, load(tmp_path, "c: {kind: oea, k0: 1}, b: {kind: topk, k0: 2}"))
    assert ids.of_name == {"vanilla": VANILLA_ID, "b": 2, "c": 1}  # a was not in use


def test_running_request_keeps_its_definition(ids: PolicyIds, tmp_path: Path) -> None:
    request = Request()
    ids.use(ids.of_name["a"], request)
    reload(ids, load(tmp_path, "a: {kind: oea, k0: 5}"))
    assert ids.table[1].policy.k0.default == 3
    assert ids.table[ids.of_name["a"]].policy.k0.default == 5
    assert ids.of_name["a"] == 2  # b was not in use
    del request
    reload(ids, load(tmp_path, "a: {kind: oea, k0: 5}, d: {kind: oea, k0: 6}"))
    assert ids.of_name == {"vanilla": VANILLA_ID, "a": 2, "d": 1}


def test_table_grows_and_shrinks(ids: PolicyIds, tmp_path: Path) -> None:
    requests = []
    for k0 in range(4, 8):
        requests.append(Request())
        ids.use(ids.of_name["a"], requests[-1])
        reload(ids, load(tmp_path, f"a: {{kind: oea, k0: {k0}}}"))
    assert [d.policy.k0.default for d in ids.table[1:]] == [3, 4, 5, 6, 7]
    del requests[:]
    reload(ids, load(tmp_path, ""))
    assert [d.name for d in ids.table] == ["vanilla"]
    assert ids.of_name == {"vanilla": VANILLA_ID}


def test_vanilla_is_always_the_first(ids: PolicyIds, tmp_path: Path) -> None:
    ids.use(VANILLA_ID, Request())
    reload(ids, load(tmp_path, "vanilla: {kind: vanilla, engage: {min_rows: 2}}"))
    assert ids.of_name == {"vanilla": VANILLA_ID}
    assert ids.table[VANILLA_ID].policy.engage.min_rows == 2


def test_another_cache_namespace_is_another_definition(ids: PolicyIds, tmp_path: Path) -> None:
    """A request must not meet KV that was written into the other kind of cache."""
    request = Request()
    ids.use(ids.of_name["b"], request)
    shared = load(tmp_path, "b: {kind: topk, k0: 2}", "prefix_cache: shared")
    reload(ids, shared)
    assert ids.table[2].cache_key.startswith("moe-routing:")
    assert ids.table[ids.of_name["b"]].cache_key == ""


def test_equal_policies_share_a_cache_namespace(tmp_path: Path) -> None:
    text = "a: {kind: oea, k0: 3}, b: {kind: oea, k0: 3}, c: {kind: oea, k0: 4}"
    _, a, b, c = define(load(tmp_path, text), {})
    assert a.cache_key == b.cache_key != c.cache_key
