"""Header, body field and model alias against the config."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from sglang_moe_routing.config import (
    BODY_PLACES,
    RoutingConfig,
    choose,
    choose_group,
    find_in_body,
    model_for,
    split_alias,
)
from sglang_moe_routing.config import (
    DEFAULT_HEADER as HEADER,
)
from sglang_moe_routing.errors import RoutingRequestError
from sglang_moe_routing.policies import builtin_registry

SCHEMA = {"moe_routing_policy": {"type": "string"}}
CONFIG = model_for(builtin_registry()).model_validate(
    {
        "version": 1,
        "default": "base",
        "clients_may_choose": ["vanilla", "fast"],
        "policies": {
            "base": {"kind": "oea", "k0": 5},
            "fast": {"kind": "oea", "k0": 3},
            "private": {"kind": "topk", "k0": 1},
        },
    }
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "base"),
        ({"headers": [(HEADER, "fast")]}, "fast"),
        ({"headers": [(HEADER, " fast ")]}, "fast"),
        ({"headers": [(HEADER, "base")]}, "base"),
        ({"headers": [(HEADER, "fast"), (HEADER, "fast")]}, "fast"),
        ({"headers": [(HEADER, "fast, fast")]}, "fast"),
        ({"headers": [(HEADER, "fast"), ("X-Other-MoE", "fast")]}, "fast"),
        ({"body": [("custom_params", "vanilla")]}, "vanilla"),
        ({"body": [("a", "fast"), ("b", "fast"), ("c", None)]}, "fast"),
        ({"alias": "fast"}, "fast"),
        ({"headers": [(HEADER, "fast")], "body": [("a", "fast")], "alias": "fast"}, "fast"),
    ],
)
def test_choice(given: dict[str, Any], expected: str) -> None:
    assert choose(CONFIG, **given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"headers": [(HEADER, "nope")]},
            "unknown MoE routing policy 'nope' in header X-MoE-Routing-Policy",
        ),
        ({"headers": [(HEADER, "private")]}, "'private' in header .* may not be chosen by clients"),
        ({"headers": [(HEADER, "fast"), (HEADER, "fats")]}, "unknown MoE routing policy 'fats'"),
        ({"headers": [(HEADER, "")]}, "malformed .* '' in header"),
        ({"headers": [(HEADER, "fast,")]}, "malformed .* '' in header"),
        ({"headers": [(HEADER, "x" * 65)]}, "malformed"),
        ({"body": [("a.b", 3)]}, "malformed MoE routing policy 3 in body field a.b"),
        ({"body": [("a", "")]}, "malformed"),
        ({"body": [("a", {"fast": 1})]}, "malformed"),
        ({"alias": ""}, "malformed .* in model alias"),
        (
            {"headers": [(HEADER, "fast"), ("X-Other-MoE", "base")]},
            "header X-MoE-Routing-Policy says 'fast', header X-Other-MoE says 'base'",
        ),
        ({"headers": [(HEADER, "fast,base")]}, "header .* says 'fast', header .* says 'base'"),
        (
            {"headers": [(HEADER, "fast")], "body": [("a", "vanilla")]},
            "header .* says 'fast', body .* 'vanilla'",
        ),
        ({"alias": "fast", "body": [("a", "vanilla")]}, "contradictory"),
    ],
)
def test_refusal(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RoutingRequestError, match=message) as caught:
        choose(CONFIG, **given)
    if "says" not in message and "contra" not in message:
        assert str(caught.value).endswith("available: vanilla, base, fast")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llm", ("llm", None)),
        ("llm@fast", ("llm", "fast")),
        ("llm@nope", ("llm", "nope")),
        ("llm:adapter@fast", ("llm:adapter", "fast")),
        ("other@fast", ("other", "fast")),
        ("other@private", ("other", "private")),
        ("other@FAST", ("other@FAST", None)),
        ("org/demo@main", ("org/demo@main", None)),
        ("claude-sonnet-4@20250514", ("claude-sonnet-4@20250514", None)),
        ("llm-2@latest", ("llm-2@latest", None)),
        ("other@", ("other@", None)),
        ("LLM@fast", ("LLM", "fast")),
        ("LLM@typo", ("LLM", "typo")),
        ("LLM:adapter@typo", ("LLM:adapter", "typo")),
        ("llm@", ("llm", "")),
        ("s3://bucket@eu/model", ("s3://bucket@eu/model", None)),
    ],
)
def test_alias(model: str, expected: tuple[str, str | None]) -> None:
    assert split_alias(CONFIG, model, "llm") == expected


def test_served_name_with_an_at_sign_is_not_split() -> None:
    assert split_alias(CONFIG, "llm@fast", "llm@fast") == ("llm@fast", None)
    assert split_alias(CONFIG, "LLM@fast", "llm@fast") == ("LLM@fast", None)
    assert split_alias(CONFIG, "llm@fast", "org/llm@fast") == ("llm@fast", None)
    assert split_alias(CONFIG, "llm@fast@base", "llm@fast") == ("llm@fast", "base")


@pytest.mark.parametrize("served", ["Org/LLM", "/models/llm/"])
@pytest.mark.parametrize("name", ["llm", "LLM:adapter", "{served}", "{served}:adapter"])
def test_the_last_part_of_a_path_is_the_models_name_too(served: str, name: str) -> None:
    model = name.format(served=served.rstrip("/").lower())
    assert split_alias(CONFIG, f"{model}@typo", served) == (model, "typo")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, []),
        ({"moe_routing_policy": "a"}, [("moe_routing_policy", "a")]),
        (
            {"moe_routing_policy": "a", "custom_params": {"moe_routing_policy": 3}},
            [("moe_routing_policy", "a"), ("custom_params.moe_routing_policy", 3)],
        ),
        (
            {"parameters": {"sampling_params": {"custom_params": {"moe_routing_policy": "a"}}}},
            [("parameters.sampling_params.custom_params.moe_routing_policy", "a")],
        ),
        (
            {"instances": [{"moe_routing_policy": "a"}, {}, 3, {"moe_routing_policy": "b"}]},
            [("instances[].moe_routing_policy", "a"), ("instances[].moe_routing_policy", "b")],
        ),
        ({"instances": {"moe_routing_policy": "a"}, "options": ["moe_routing_policy"]}, []),
        ({"messages": [{"moe_routing_policy": "a"}]}, []),
        ({"format": {"type": "object", "properties": SCHEMA}}, []),
        ({"response_format": {"schema": {"properties": SCHEMA}}}, []),
        ({"output_format": {"schema": {"properties": SCHEMA}}}, []),
        ({"chat_template_kwargs": {"moe_routing_policy": True}}, []),
        ({"state": {"config": {"moe_routing_policy": "we use fast"}}}, []),
    ],
)
def test_a_policy_counts_in_listed_objects_of_a_body_only(
    body: dict[str, Any], expected: list[tuple[str, Any]]
) -> None:
    """Not in what the model is to read or to write: messages and schemas."""
    assert list(find_in_body(body)) == expected


def test_a_policy_counts_in_every_listed_object() -> None:
    for place in BODY_PLACES:
        body: dict[str, Any] = {"moe_routing_policy": "a"}
        for key in reversed(place.split(".") if place else []):
            body = {key: body}
        assert [value for _, value in find_in_body(body)] == ["a"], place


def isolated(**isolation: Any) -> RoutingConfig:
    content = {"version": 1, "policies": {"fast": {"kind": "oea", "k0": 3}}, "isolation": isolation}
    return model_for(builtin_registry()).model_validate(content)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_without_isolation_everybody_is_in_one_group() -> None:
    assert CONFIG.isolation.groups == ("default",)
    assert choose_group(CONFIG, "fast", "Bearer whatever") == "default"


def test_group_of_a_policy() -> None:
    config = isolated(policies={"fast": "lossy"})
    assert config.isolation.groups == ("default", "lossy")
    assert choose_group(config, "fast", None) == "lossy"
    assert choose_group(config, "vanilla", None) == "default"


def test_order_of_the_file_does_not_number_groups() -> None:
    keys = {digest("a"): "one", digest("b"): "two"}
    backwards = dict(reversed(keys.items()))
    assert isolated(api_keys=keys).isolation.groups == ("default", "one", "two")
    assert isolated(api_keys=backwards).isolation.groups == ("default", "one", "two")


def test_group_of_an_api_key_wins() -> None:
    config = isolated(api_keys={digest("s3cret"): "tenant"}, policies={"fast": "lossy"})
    for header in ("Bearer s3cret", "bearer s3cret"):
        assert choose_group(config, "fast", header) == "tenant"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer other", "Basic s3cret", "s3cret", "Bearer s3cret "]
)
def test_key_that_is_not_listed_is_refused(header: str | None) -> None:
    config = isolated(api_keys={digest("s3cret"): "tenant"})
    with pytest.raises(RoutingRequestError, match="API key") as error:
        choose_group(config, "vanilla", header)
    assert error.value.status == 401
    assert error.value.reason == "unknown_api_key"


def test_other_keys_may_be_allowed() -> None:
    config = isolated(
        api_keys={digest("s3cret"): "tenant"}, other_keys="allow", policies={"fast": "lossy"}
    )
    assert choose_group(config, "fast", "Bearer other") == "lossy"
    assert choose_group(config, "vanilla", None) == "default"
