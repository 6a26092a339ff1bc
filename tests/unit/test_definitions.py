"""Policy ids across reloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_routing.config import LoadedConfig, load_config
from sglang_moe_routing.policies import Vanilla
from sglang_moe_routing.runtime.definitions import VANILLA_ID, PolicyIds, define


class Request:
    """Something that uses a policy."""

    is_finished = False

    def finished(self) -> bool:
        return self.is_finished


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
    assert ids.of_name == {"vanilla": VANILLA_ID, "b": 2, "c": 3}
    reload(ids, load(tmp_path, "d: {kind: oea, k0: 1}, b: {kind: topk, k0: 2}"))
    assert ids.of_name == {"vanilla": VANILLA_ID, "b": 2, "d": 1}  # a is gone and was not in use


def test_running_request_keeps_its_definition(ids: PolicyIds, tmp_path: Path) -> None:
    request = Request()
    ids.use(ids.of_name["a"], request)
    new = load(tmp_path, "a: {kind: oea, k0: 5}")
    for _ in range(3):
        reload(ids, new)
        assert ids.table[1].policy.k0.default == 3
        assert ids.table[ids.of_name["a"]].policy.k0.default == 5
    del request
    reload(ids, load(tmp_path, "a: {kind: oea, k0: 5}, d: {kind: oea, k0: 6}"))
    assert ids.of_name == {"vanilla": VANILLA_ID, "a": 3, "d": 1}


def test_request_that_comes_while_a_reload_is_under_way_keeps_its_definition(
    ids: PolicyIds, tmp_path: Path
) -> None:
    """The table is made first and adopted later; the scheduler takes requests between the two."""
    definitions = define(load(tmp_path, "a: {kind: oea, k0: 5}"), {})
    table = ids.with_config(definitions)
    requests = {name: Request() for name in ("a", "b")}
    for name, request in requests.items():
        ids.use(ids.of_name[name], request)
    ids.adopt(table, definitions)
    assert [d.name for d in ids.table[:3]] == ["vanilla", "a", "b"]
    assert ids.table[1].policy.k0.default == 3
    reload(ids, load(tmp_path, ""))
    reload(ids, load(tmp_path, "e: {kind: oea, k0: 7}"))
    assert ids.table[1].policy.k0.default == 3
    assert ids.table[2].name == "b"


def test_table_grows_and_shrinks(ids: PolicyIds, tmp_path: Path) -> None:
    requests = []
    for k0 in range(4, 8):
        requests.append(Request())
        ids.use(ids.of_name["a"], requests[-1])
        reload(ids, load(tmp_path, f"a: {{kind: oea, k0: {k0}}}"))
    assert {d.policy.k0.default for d in ids.table if d.name == "a"} == {3, 4, 5, 6, 7}
    del requests[:]
    for _ in range(2):
        reload(ids, load(tmp_path, ""))
    assert [d.name for d in ids.table] == ["vanilla"]
    assert ids.of_name == {"vanilla": VANILLA_ID}


def test_table_does_not_grow_with_the_number_of_reloads(ids: PolicyIds, tmp_path: Path) -> None:
    for number in range(20):
        reload(ids, load(tmp_path, f"p{number}: {{kind: oea, k0: 3}}"))
    assert len(ids.table) <= 4  # vanilla, the last two, and b's place


def test_vanilla_is_always_the_first(ids: PolicyIds, tmp_path: Path) -> None:
    ids.use(VANILLA_ID, Request())
    reload(ids, load(tmp_path, "vanilla: {kind: vanilla}"))
    assert ids.of_name == {"vanilla": VANILLA_ID}
    assert ids.table[VANILLA_ID].policy == Vanilla()


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
