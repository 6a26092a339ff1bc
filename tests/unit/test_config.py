"""Routing configs: what is accepted, and how every mistake is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_routing.config import (
    DEFAULT_HEADER,
    LoadedConfig,
    bundled_config,
    json_schema,
    load_config,
)
from sglang_moe_routing.errors import ConfigError
from sglang_moe_routing.policies import OEA, SERE, Vanilla, builtin_registry

ROOT = Path(__file__).parents[2]
READY_MADE = sorted((ROOT / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str) -> LoadedConfig:
    path = tmp_path / "routing.yaml"
    path.write_text(text)
    return load_config(path, builtin_registry())


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "routing.yaml"))
    return message.replace(f"{tmp_path}/", "")


def test_ready_made_configs_are_the_announced_ones() -> None:
    names = {path.stem for path in READY_MADE}
    assert names == {"default", "oea", "sere", "mixed", "qwen3-30b-a3b", "bench"}


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_ready_made_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERE_ARTIFACT", "similarity.safetensors")
    loaded = load_config(path)
    assert loaded.config.names[0] == "vanilla"
    assert len(loaded.config.names) > 1
    assert bundled_config(path.name) == path


def test_vanilla_always_exists_with_id_0(tmp_path: Path) -> None:
    config = load(tmp_path, "version: 1\npolicies: {a: {kind: oea, k0: 3}}").config
    assert config.names == ("vanilla", "a")
    assert config.definitions == (Vanilla(), OEA(k0=3))
    assert config.choosable == ("vanilla", "a")


def test_listed_vanilla_keeps_id_0(tmp_path: Path) -> None:
    text = "version: 1\npolicies: {a: {kind: topk, k0: 3}, vanilla: {kind: vanilla}}"
    assert load(tmp_path, text).config.names == ("vanilla", "a")


def test_schedules_and_engagement_are_read(tmp_path: Path) -> None:
    text = """
version: 1
policies:
  a:
    kind: oea
    k0: {default: 3, rows: {4: 5}, layers: {"0-1,7": 6}}
    engage: {phase: all, min_rows: 2, max_rows: 64, layers: [0, "2-4"]}
"""
    policy = load(tmp_path, text).config.policies["a"]
    assert isinstance(policy, OEA)
    assert [policy.k0.value(3, n) for n in (1, 4, 100)] == [3, 5, 5]
    assert [policy.k0.value(layer, 100) for layer in (0, 1, 7)] == [6, 6, 6]
    assert policy.engage.layers == (0, 2, 3, 4)
    assert policy.engage.covers(2, 64)
    assert not policy.engage.covers(2, 65)
    assert not policy.engage.covers(1, 2)


def test_artifact_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", "sub/folder")
    text = """
version: 1
similarity: {a: "${WHERE}/x.safetensors", b: /abs/y.safetensors}
policies: {s: {kind: sere, num_primary: 2, similarity: a}}
"""
    loaded = load(tmp_path, text)
    assert loaded.similarity_paths == {
        "a": tmp_path / "sub/folder/x.safetensors",
        "b": Path("/abs/y.safetensors"),
    }
    assert loaded.config.artifact_of("s") == "a"
    assert isinstance(loaded.config.policies["s"], SERE)


SERE_POLICY = "policies: {s: {kind: sere, num_primary: 2}}"

KEY = "a" * 64
KEYS = ", ".join(f"{KEY[1:]}{i}: g{i}" for i in range(8))

PROBLEMS = {
    "isolation: {policies: {a: g}}": "isolation.policies: 'a' is not a policy; known: vanilla",
    "isolation: {api_keys: {s3cret: g}}": "isolation.api_keys.s3cret: not a valid key:",
    f"isolation: {{api_keys: {{{KEY}: 'a b'}}}}": "String should match pattern",
    f"isolation: {{api_keys: {{{KEYS}}}}}": (
        "isolation: 9 groups with 'default', at most 8: every group costs one kernel launch"
    ),
    "reload: {http: everybody}": "reload.http: Input should be 'admin' or 'open', got 'everybody'",
    "metrics: {interval: 0}": "metrics.interval: Input should be greater than or equal to 0.1",
    "polices: {}": "routing.yaml:2: polices: unknown key, did you mean 'policies'?",
    "zzz: 1": "routing.yaml:2: zzz: unknown key, known: version, default, header,",
    "policies: {a: {kind: oea, k00: 3, k0: 1}}": (
        "routing.yaml:2: policies.a.k00: unknown key, did you mean 'k0'?"
    ),
    "policies: {a: {kind: oea}}": "routing.yaml:2: policies.a.k0: missing",
    "policies: {a: {kind: seer, k0: 1}}": (
        "routing.yaml:2: policies.a.kind: 'seer' is not a policy kind; "
        "known: budget, lynx, oea, sere, topk, vanilla, xshare"
    ),
    "policies: {a: {k0: 1}}": "routing.yaml:2: policies.a.kind: missing; known: budget,",
    "policies:\n  a: {kind: oea, k0: 0}": (
        "routing.yaml:3: policies.a.k0.default: Input should be greater than or equal to 1, got 0"
    ),
    "policies: {a: {kind: oea, k0: true}}": "Input should be a valid integer, got True",
    "policies: {a: {kind: oea, k0: three}}": "Input should be a valid integer, got 'three'",
    "policies: {a: {kind: oea, k0: 3, p: 0}}": "policies.a.p: Input should be greater than 0",
    "policies: {a: {kind: oea, k0: 3, p: .nan}}": "policies.a.p: ",
    "policies: {a: {kind: oea, k0: {default: 3, rows: {0: 1}}}}": (
        "policies.a.k0.rows.0: not a valid key"
    ),
    "policies: {a: {kind: oea, k0: {default: 3, rwos: {4: 1}}}}": (
        "policies.a.k0.rwos: unknown key, did you mean 'rows'?"
    ),
    "policies: {a: {kind: oea, k0: {default: 3, layers: {x: 1}}}}": (
        "policies.a.k0.layers: 'x' is not a layer id or a range such as 0-3"
    ),
    "policies: {a: {kind: oea, k0: 3, engage: {layers: 0-9999999999}}}": (
        "policies.a.engage.layers: '0-9999999999': layer ids end at 9999"
    ),
    "similarity: {a: {path: x, allow_other_weigths: true}}": (
        "similarity.a.allow_other_weigths: unknown key, did you mean 'allow_other_weights'?"
    ),
    "similarity: {a: {allow_other_weights: true}}": "similarity.a.path: missing",
    "policies: {a: {kind: oea, k0: {default: 3, layers: {0-1: x}}}}": (
        "policies.a.k0.layers.0-1: Input should be a valid integer, got 'x'"
    ),
    "policies: {a: {kind: oea, k0: {default: 3, layers: {0-2: 1, 2-3: 1}}}}": (
        "layer 2 is given twice"
    ),
    "policies: {a: {kind: oea, k0: 3, engage: {min_rows: 9, max_rows: 2}}}": (
        "policies.a.engage: max_rows (2) is below min_rows (9)"
    ),
    "policies: {a: {kind: oea, k0: 3, engage: {phase: prefill}}}": (
        "policies.a.engage.phase: Input should be 'decode' or 'all', got 'prefill'"
    ),
    "policies: {a: {kind: oea, k0: 3, engage: {max_rows: 2147483647}}}": (
        "policies.a.engage.max_rows: 2147483647 is above 65535, the most that can be said; "
        "where there is no limit, leave max_rows out"
    ),
    "policies: {a: {kind: oea, k0: 3, engage: {min_rows: 4294967297}}}": (
        "policies.a.engage.min_rows: Input should be less than or equal to 65535, got 4294967297"
    ),
    "policies: {a: {kind: oea, k0: {default: 3, rows: {4294967297: 1}}}}": (
        "policies.a.k0.rows.4294967297: not a valid key: Input should be less than or equal to"
    ),
    "policies: {a: {kind: oea, k0: {default: 3, layers: {'0-1': 2, '0,1': 1}}}}": (
        "policies.a.k0.layers: layer 0 is given twice, by '0-1' and '0,1'"
    ),
    "policies: {vanilla: {kind: vanilla, engage: {min_rows: 3}}}": (
        "policies.vanilla: engage: has no effect, because vanilla never re-routes"
    ),
    "isolation: {other_keys: allow}": "isolation: other_keys: has no effect without api_keys",
    "policies: {'two words': {kind: oea, k0: 3}}": (
        "policies.two words: not a valid key: String should match pattern"
    ),
    "policies: {vanilla: {kind: oea, k0: 3}}": "the name 'vanilla' is reserved",
    "default: fast": "routing.yaml:2: default: 'fast' is not a policy; known: vanilla",
    "clients_may_choose: [fast]": "clients_may_choose: 'fast' is not a policy",
    "header: 'X Y'": "routing.yaml:2: header: 'X Y' may belong to HTTP, a proxy or SGLang",
    "header: Content-Length": "header: 'Content-Length' may belong to HTTP",
    "header: Authorization": "header: 'Authorization' may belong to HTTP",
    "header: X-Request-Id": "header: 'X-Request-Id' may belong to HTTP",
    "header: X-Forwarded-For": "header: 'X-Forwarded-For' may belong to HTTP",
    "header: X-Override-Priority": "header: 'X-Override-Priority' may belong to HTTP",
    "header: [X-MoE-Routing-Policy, Host]": "header: 'Host' may belong to HTTP",
    "header: [X-MoE, x-moe]": "header: expected one or more names, each once",
    "header: []": "header: expected one or more names",
    "header: 3": "header: Input should be a valid list, got 3",
    "prefix_cache: none": "prefix_cache: Input should be 'isolated' or 'shared', got 'none'",
    "statistics: 1": "statistics: Input should be a valid boolean, got 1",
    SERE_POLICY: "policies.s.similarity: name one of the similarity artifacts; known: none",
    SERE_POLICY + "\nsimilarity: {a: x, b: y}": "known: a, b",
    "policies: {s: {kind: sere, num_primary: 2, similarity: c}}\nsimilarity: {a: x}": (
        "'c' is not in the top-level 'similarity' section; known: a"
    ),
    "similarity: {a: '${NO_SUCH_VARIABLE}/x'}": (
        "routing.yaml:2: similarity.a: environment variable NO_SUCH_VARIABLE in "
        "'${NO_SUCH_VARIABLE}/x' is not set"
    ),
    "default: a\ndefault: b": "routing.yaml:3: not valid YAML: key 'default' is given twice",
    "policies: {a: {kind: oea, <<: {k0: 1}, <<: {k0: 2}}}": "key '<<' is given twice",
    "policies: {a: {kind: oea, <<: 5}}": "routing.yaml:2: not valid YAML: '<<' merges mappings",
    "policies: &a {b: *a}": "routing.yaml:2: not valid YAML: found unconstructable recursive node",
    "clients_may_choose: 5": (
        "routing.yaml:2: clients_may_choose: Input should be 'all' or a list of policies, got 5"
    ),
    "clients_may_choose: [5]": "routing.yaml:2: clients_may_choose.0: Input should be a valid str",
    "metrics: often": "routing.yaml:2: metrics: Input should be keys with values, got 'often'",
    "policies: {a: {kind: oea, k0: 3, engage: 5}}": "a.engage: Input should be keys with values",
    "default: [": "not valid YAML",
    "? [a]\n: b": "not valid YAML",
    "default: 2024-13-45": "not valid YAML",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_mistakes_name_place_value_and_remedy(tmp_path: Path, text: str) -> None:
    assert PROBLEMS[text] in problem(tmp_path, f"version: 1\n{text}")


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    message = problem(tmp_path, "version: 2\ndefalt: x\npolicies: {a: {kind: oea, k0: 0}}")
    assert len(message.splitlines()) == 3


WITHOUT_VERSION = {
    "": "routing.yaml:1: the file is empty; it needs at least 'version: 1'",
    "[]": "routing.yaml:1: the file: Input should be keys with values, got []",
    "just text": "routing.yaml:1: the file: Input should be keys with values, got 'just text'",
    "policies: {}": "routing.yaml:1: version: missing; this key is required",
}


@pytest.mark.parametrize("text", WITHOUT_VERSION)
def test_file_without_a_version_is_refused(tmp_path: Path, text: str) -> None:
    assert problem(tmp_path, text) == WITHOUT_VERSION[text]


def test_merge_keys_bring_what_a_policy_does_not_say_itself(tmp_path: Path) -> None:
    text = """
version: 1
policies:
  a: &a {kind: oea, k0: 3, engage: {min_rows: 2}}
  b: {<<: *a, k0: 4}
  c: {p: 0.5, <<: [*a, {kind: topk, max_rank: 9}]}
"""
    policies = load(tmp_path, text).config.policies
    assert policies["b"] == OEA.model_validate({"k0": 4, "engage": {"min_rows": 2}})
    assert policies["c"] == OEA.model_validate(
        {"k0": 3, "p": 0.5, "max_rank": 9, "engage": {"min_rows": 2}}
    )


def nested(levels: int, start: str, again: str) -> str:
    """YAML whose every level refers ten times to the one before."""
    lines = [f"- &a0 {start}"]
    for level in range(1, levels):
        lines.append(f"- &a{level} " + again.format(", ".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines)


def policy(fields: str) -> str:
    return f"version: 1\npolicies: {{a: {{{fields}}}}}"


HUGE = {
    "aliases": nested(8, "[1, 1]", "[{}]"),
    "merges": nested(12, "{k: 1}", "{{<<: [{}]}}"),
    "a text": f"version: {'1' * 10_000}",
    "a number": policy(f"kind: oea, k0: 0x{'f' * 10_000}"),
    "a key": f"version: 1\n{'k' * 500}: 1",
    "a range of layers": policy("kind: oea, k0: {default: 3, layers: {0-9999: x}}"),
    "scattered layers": policy(
        f"kind: oea, k0: {{default: 3, layers: {{{','.join(map(str, range(0, 999, 2)))!r}: x}}}}"
    ),
    "a kind": policy(f"kind: {'k' * 10_000}"),
    "a layer": policy(f"kind: oea, k0: 1, engage: {{layers: {'k' * 10_000}}}"),
    "an alias": f"version: *{'k' * 10_000}",
    "many problems": "version: 1\npolicies:\n  a: &a {kind: oea, "
    + ", ".join(f"x{i}: 1" for i in range(50))
    + "}\n"
    + "\n".join(f"  p{i}: *a" for i in range(200)),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_messages_are_short_whatever_the_file_holds(tmp_path: Path, text: str) -> None:
    message = problem(tmp_path, text)
    assert all(len(line) < 500 for line in message.splitlines())
    assert len(message.splitlines()) <= 101


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the routing config: No such"):
        load_config(tmp_path / "none.yaml")


def test_schema_describes_every_key() -> None:
    schema = json_schema(builtin_registry())
    assert set(schema["properties"]) == {
        "version",
        "default",
        "torch_policies",
        "header",
        "clients_may_choose",
        "prefix_cache",
        "statistics",
        "metrics",
        "reload",
        "isolation",
        "similarity",
        "policies",
    }
    assert {"Budget", "OEA", "SERE", "TopK", "Vanilla", "Engagement"} <= set(schema["$defs"])
    for name in ("Budget", "OEA", "SERE", "TopK", "Engagement"):
        for key, field in schema["$defs"][name]["properties"].items():
            assert key == "kind" or field.get("description"), f"{name}.{key} is not described"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", [DEFAULT_HEADER]),
        ("header: x-moe", ["x-moe"]),
        ("header: X-Request-Id-MoE-Routing-Policy", ["X-Request-Id-MoE-Routing-Policy"]),
        (
            "header: [X-SGL-MoE-Policy, X-SMG-Routing-Key]",
            ["X-SGL-MoE-Policy", "X-SMG-Routing-Key"],
        ),
    ],
)
def test_header_is_a_name_or_a_list_of_names(tmp_path: Path, text: str, names: list[str]) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(f"version: 1\n{text}\n")
    assert load_config(path).config.header == names
