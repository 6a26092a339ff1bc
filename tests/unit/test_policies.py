"""Policy kinds as data: registry, validation, schedules, engagement, and compilation to tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from sglang_moe_routing.errors import PolicyError, RoutingError
from sglang_moe_routing.policies import (
    ENTRY_POINT_GROUP,
    FREE,
    OEA,
    PAD,
    SERE,
    WORDS,
    Budget,
    Count,
    Engagement,
    Flag,
    Layers,
    Place,
    Policy,
    PolicyRegistry,
    Rerouted,
    Rows,
    Rule,
    Similarity,
    Sizes,
    TopK,
    TorchPolicy,
    Vanilla,
    build_table,
    builtin_registry,
    doubts,
    installed_registry,
    problems,
    reroute,
)
from sglang_moe_routing.policies.table import FLOATS
from sglang_moe_routing.testing import oracle

ROOT = Path(__file__).parents[2]
NUM_EXPERTS, TOP_K = 8, 4
BUILTIN = ["budget", "lynx", "oea", "sere", "topk", "vanilla", "xshare"]


# --- registry ----------------------------------------------------------------------------------


class Mirror(TorchPolicy):
    """Every expert j becomes N-1-j: absurd, and easy to recognise."""

    kind: Literal["mirror"] = "mirror"
    weight: float = 3.0

    def required(self, rows: Rows) -> Tensor:
        return (rows.rank < rows.top_k).flip(1)

    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.full_like(rows.topk_weights, self.weight)
        return rows.num_experts - 1 - rows.topk_ids, weights


def test_the_builtin_kinds_are_registered_by_name() -> None:
    """A built-in registry knows the kinds of this package, in order of their names."""
    registry = builtin_registry()
    assert list(registry) == BUILTIN
    assert registry.classes() == [registry[kind] for kind in BUILTIN]
    assert registry["oea"] is OEA
    assert "oea" in registry
    assert "mirror" not in registry


def test_register_returns_the_class_so_that_it_can_decorate() -> None:
    """A registered class comes back unchanged and is found under its kind."""
    registry = PolicyRegistry()
    assert registry.register(Mirror) is Mirror
    assert registry["mirror"] is Mirror


def test_registries_share_nothing() -> None:
    """What is registered in one registry is unknown to the next."""
    builtin_registry().register(Mirror)
    assert "mirror" not in builtin_registry()


def test_a_second_class_of_the_same_kind_is_refused() -> None:
    """A duplicate kind is refused with the names of both classes."""

    class Impostor(Policy):
        kind: Literal["oea"] = "oea"

    registry = builtin_registry()
    with pytest.raises(PolicyError, match=r"'oea' of .*Impostor is already registered by .*OEA"):
        registry.register(Impostor)
    assert registry["oea"] is OEA


def test_an_unknown_kind_lists_the_known_ones() -> None:
    """Asking for an unknown kind names it and every kind there is."""
    with pytest.raises(PolicyError, match=r"'seer' is not registered; known: budget, lynx, oea"):
        builtin_registry()["seer"]


class NoKind(Policy):
    """Forgets to say its kind."""


class KindWithoutDefault(Policy):
    kind: Literal["half"]


@pytest.mark.parametrize("thing", [object(), "oea", BaseModel, OEA.model_validate({"k0": 1})])
def test_only_policy_classes_can_be_registered(thing: Any) -> None:
    """Anything but a subclass of Policy is refused."""
    with pytest.raises(PolicyError, match="is not a subclass of"):
        PolicyRegistry().register(thing)


@pytest.mark.parametrize("policy", [NoKind, KindWithoutDefault, Policy])
def test_a_policy_class_has_to_name_its_kind(policy: type[Policy]) -> None:
    """A class without a default kind is refused with the line that is missing."""
    with pytest.raises(PolicyError, match=rf"{policy.__name__} declares no kind; add: kind: Lit"):
        PolicyRegistry().register(policy)


def test_policy_errors_are_routing_errors_and_value_errors() -> None:
    """Callers may catch a PolicyError as either of its bases."""
    assert issubclass(PolicyError, RoutingError)
    assert issubclass(PolicyError, ValueError)


# --- entry points ------------------------------------------------------------------------------

PLUGIN = """
from typing import Literal
from sglang_moe_routing.policies import Policy

class Good(Policy):
    kind: Literal["plugged"] = "plugged"

class Duplicate(Policy):
    kind: Literal["topk"] = "topk"

not_a_policy = 3
"""


class Distribution:
    """A third-party package on the path, made of real files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "routing_plugin_under_test.py").write_text(PLUGIN)
        (folder / "routing_plugin_broken.py").write_text("import a_module_that_is_not_there\n")

    def offer(self, *lines: str) -> None:
        info = self.folder / "routing_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: routing-plugin\nVersion: 1\n")
        (info / "entry_points.txt").write_text("\n".join((f"[{ENTRY_POINT_GROUP}]", *lines, "")))


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Distribution(tmp_path)
    for name in ("routing_plugin_under_test", "routing_plugin_broken"):
        sys.modules.pop(name, None)


def test_an_installed_package_can_add_a_kind(distribution: Distribution) -> None:
    """A class offered as an entry point is in the registry beside the built-in kinds."""
    distribution.offer("plugged = routing_plugin_under_test:Good")
    registry = installed_registry()
    assert {*BUILTIN, "plugged"} <= set(registry)
    assert registry["plugged"].__module__ == "routing_plugin_under_test"
    assert "plugged" not in builtin_registry()


def test_a_package_that_cannot_be_imported_is_named(distribution: Distribution) -> None:
    """A broken import is refused with the entry point, its target, and the cause."""
    distribution.offer("broken = routing_plugin_broken:Good")
    with pytest.raises(
        PolicyError,
        match=r"'broken' \(routing_plugin_broken:Good\) .*ModuleNotFound.*a_module_that_is_not",
    ) as caught:
        installed_registry()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_class_that_is_not_there_is_named(distribution: Distribution) -> None:
    """An entry point to a missing attribute is refused with both names."""
    distribution.offer("gone = routing_plugin_under_test:Gone")
    with pytest.raises(PolicyError, match=r"'gone' .*AttributeError.*Gone"):
        installed_registry()


def test_an_installed_package_cannot_replace_a_kind(distribution: Distribution) -> None:
    """A kind that is taken stays with its first owner, and both are named."""
    distribution.offer("mine = routing_plugin_under_test:Duplicate")
    with pytest.raises(PolicyError, match=r"'topk' of routing_plugin_under_test.Duplicate is alr"):
        installed_registry()


def test_an_entry_point_to_something_else_is_refused(distribution: Distribution) -> None:
    """An entry point that is no policy class is refused."""
    distribution.offer("three = routing_plugin_under_test:not_a_policy")
    with pytest.raises(PolicyError, match="3 is not a subclass of"):
        installed_registry()


# --- validation --------------------------------------------------------------------------------

ACCEPTED: list[tuple[type[Policy], dict[str, Any]]] = [
    (Vanilla, {}),
    (TopK, {"k0": 1}),
    (TopK, {"k0": {"default": 2, "rows": {8: 3}, "layers": {"0-3,7": 4, 9: 1}}}),
    (OEA, {"k0": 3}),
    (OEA, {"k0": 3, "p": 1}),
    (OEA, {"k0": 3, "p": 0.001, "k_max": 1, "max_rank": 1}),
    (SERE, {"num_primary": 1}),
    (SERE, {"num_primary": 2, "threshold": 0}),
    (SERE, {"num_primary": 2, "threshold": -0.5, "similarity": "general"}),
    (SERE, {"num_primary": 2, "threshold": {"default": 0.3, "rows": {16: 0.5}}}),
    (OEA, {"k0": 3, "engage": {"phase": "all", "min_rows": 2, "max_rows": 2, "layers": "1-3"}}),
    (OEA, {"k0": 3, "compensation": 0.6}),
    (SERE, {"num_primary": 1, "compensation": 0}),
]


@pytest.mark.parametrize(("policy", "fields"), ACCEPTED)
def test_a_valid_policy_survives_a_round_trip(policy: type[Policy], fields: Any) -> None:
    """A valid definition is accepted, and what it dumps is accepted as the same policy."""
    made = policy.model_validate(fields)
    assert made.kind == policy.model_fields["kind"].default
    assert policy.model_validate(made.model_dump()) == made


REFUSED: list[tuple[type[Policy], dict[str, Any], str]] = [
    (Vanilla, {"k0": 2}, "k0"),
    (Vanilla, {"kind": "topk"}, "kind"),
    (TopK, {}, "k0"),
    (TopK, {"k0": 0}, "k0"),
    (TopK, {"k0": -1}, "k0"),
    (TopK, {"k0": 2.0}, "k0"),
    (TopK, {"k0": "2"}, "k0"),
    (TopK, {"k0": True}, "k0"),
    (TopK, {"k0": {"rows": {8: 3}}}, "default"),
    (TopK, {"k0": {"default": 1, "rows": {0: 3}}}, "rows"),
    (TopK, {"k0": {"default": 1, "rows": {8: 0}}}, "rows"),
    (TopK, {"k0": {"default": 1, "layers": {"x": 3}}}, "layer id"),
    (TopK, {"k0": {"default": 1, "layers": {"5-3": 3}}}, "empty range"),
    (TopK, {"k0": {"default": 1, "layers": {"0-3": 3, "2": 1}}}, "layer 2 is given twice"),
    (TopK, {"k0": {"default": 1, "steps": {8: 3}}}, "steps"),
    (TopK, {"k0": 1, "p": 0.5}, "p"),
    (OEA, {"p": 0.5}, "k0"),
    (OEA, {"k0": 3, "compensation": 1.1}, "compensation"),
    (TopK, {"k0": 3, "compensation": -0.1}, "compensation"),
    (SERE, {"num_primary": 1, "compensation": "0.5"}, "compensation"),
    (OEA, {"k0": 3, "p": 0.0}, "p"),
    (OEA, {"k0": 3, "p": 1.1}, "p"),
    (OEA, {"k0": 3, "p": float("nan")}, "p"),
    (OEA, {"k0": 3, "p": "0.5"}, "p"),
    (OEA, {"k0": 3, "k_max": 0}, "k_max"),
    (OEA, {"k0": 3, "k_max": 2.5}, "k_max"),
    (OEA, {"k0": 3, "max_rank": 0}, "max_rank"),
    (OEA, {"k0": 3, "maxrank": 4}, "maxrank"),
    (SERE, {}, "num_primary"),
    (SERE, {"num_primary": 0}, "num_primary"),
    (SERE, {"num_primary": 1, "threshold": float("nan")}, "threshold"),
    (SERE, {"num_primary": 1, "threshold": float("inf")}, "threshold"),
    (SERE, {"num_primary": 1, "threshold": "high"}, "threshold"),
    (SERE, {"num_primary": 1, "similarity": 3}, "similarity"),
    (OEA, {"k0": 3, "engage": {"phase": "prefill"}}, "phase"),
    (OEA, {"k0": 3, "engage": {"min_rows": 0}}, "min_rows"),
    (OEA, {"k0": 3, "engage": {"max_rows": 0}}, "max_rows"),
    (OEA, {"k0": 3, "engage": {"min_rows": 5, "max_rows": 4}}, r"max_rows \(4\) is below min"),
    (OEA, {"k0": 3, "engage": {"layers": "1,,2"}}, "layers"),
    (OEA, {"k0": 3, "engage": {"layers": [True]}}, "layers"),
    (OEA, {"k0": 3, "engage": {"layers": -1}}, "layers"),
    (OEA, {"k0": 3, "engage": {"layer": 1}}, "layer"),
    (OEA, {"k0": 3, "engage": {"max_rows": 65_536}}, "where there is no limit, leave max_rows out"),
    (Vanilla, {"engage": {"min_rows": 2}}, "engage: has no effect"),
    (
        OEA,
        {"k0": {"default": 3, "rows": {2: 4, 3: 5}}, "engage": {"min_rows": 3}},
        r"k0\.rows\.2: ",
    ),
    (OEA, {"k0": {"default": 3, "rows": {9: 4}}, "engage": {"max_rows": 8}}, r"k0\.rows\.9: has"),
    (
        SERE,
        {
            "num_primary": 1,
            "threshold": {"default": 0.0, "layers": {"2-3": 0.1}},
            "engage": {"layers": "0-1"},
        },
        r"threshold\.layers\.2-3: has no effect",
    ),
]


@pytest.mark.parametrize(("policy", "fields", "named"), REFUSED)
def test_an_invalid_policy_is_refused_by_name(
    policy: type[Policy], fields: Any, named: str
) -> None:
    """A definition that is wrong anywhere is refused, and the message names the place."""
    with pytest.raises(ValidationError, match=named):
        policy.model_validate(fields)


def test_policies_are_frozen() -> None:
    """A policy cannot change after it was made."""
    with pytest.raises(ValidationError, match="frozen"):
        OEA.model_validate({"k0": 3}).p = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (5, (5,)),
        ("5", (5,)),
        ("0-3", (0, 1, 2, 3)),
        ("0-2, 7", (0, 1, 2, 7)),
        ("7,1-2,2", (1, 2, 7)),
        ([3, "0-1"], (0, 1, 3)),
    ],
)
def test_layers_can_be_written_as_a_number_a_range_or_a_list(text: Any, layers: Any) -> None:
    """Every way to write layers gives their sorted ids."""
    assert TypeAdapter(Layers).validate_python(text) == layers


# --- schedules and engagement ------------------------------------------------------------------


def test_a_plain_number_is_the_same_everywhere() -> None:
    """A number is a schedule with a default alone."""
    schedule = TypeAdapter(Count).validate_python(3)
    assert {schedule.value(layer, n) for layer in (0, 9) for n in (0, 1, 1000)} == {3}
    assert schedule.values() == [3]


def test_the_highest_reached_step_decides_whatever_order_they_are_written_in() -> None:
    """A step holds from its number of live rows on, up to the next."""
    schedule = TypeAdapter(Count).validate_python({"default": 5, "rows": {16: 2, 4: 4, 8: 3}})
    expected = {0: 5, 1: 5, 3: 5, 4: 4, 7: 4, 8: 3, 15: 3, 16: 2, 999: 2}
    assert {n: schedule.value(0, n) for n in expected} == expected
    assert sorted(schedule.values()) == [2, 3, 4, 5]


def test_a_layer_wins_over_a_step() -> None:
    """On a named layer the number of live rows does not matter."""
    schedule = TypeAdapter(Similarity).validate_python(
        {"default": 0.5, "rows": {2: 0.25}, "layers": {"1-2,5": 0.75, "7": -0.5}}
    )
    assert [schedule.value(layer, 9) for layer in range(8)] == [
        *(0.25, 0.75, 0.75),
        *(0.25, 0.25, 0.75),
        *(0.25, -0.5),
    ]
    assert schedule.value(0, 1) == 0.5


def test_a_policy_is_engaged_everywhere_unless_it_says_otherwise() -> None:
    """By default a policy covers every layer and any number of live rows, in decode."""
    engage = Engagement()
    assert engage.phase == "decode"
    assert all(engage.covers(layer, n) for layer in (0, 99) for n in (1, 10_000))


def test_engagement_includes_both_ends_of_its_range() -> None:
    """The fewest and the most rows are inside, and only named layers are."""
    engage = Engagement.model_validate({"min_rows": 3, "max_rows": 5, "layers": "2,4-5"})
    assert [n for n in range(9) if engage.covers(2, n)] == [3, 4, 5]
    assert [layer for layer in range(9) if engage.covers(layer, 4)] == [2, 4, 5]
    lower = Engagement(min_rows=3)
    assert [n for n in range(6) if lower.covers(0, n)] == [3, 4, 5]


# --- fit to a model ----------------------------------------------------------------------------

DENSE_FIRST = {layer: Sizes(top_k=8, num_experts=64) for layer in range(1, 48)}

BEYOND: list[tuple[dict[str, Any], list[str]]] = [
    ({"engage": {"layers": "900-950"}}, ["engage.layers: the model has no MoE layer at 900-950"]),
    ({"engage": {"layers": "0"}}, ["engage.layers: the model has no MoE layer at 0"]),
    ({"engage": {"layers": "0,4"}}, ["engage.layers: the model has no MoE layer at 0"]),
    ({"engage": {"layers": "40-48"}}, ["engage.layers: the model has no MoE layer at 48"]),
    ({"engage": {"layers": "0-47"}}, []),
    ({"engage": {"layers": [5, 47]}}, []),
    (
        {"k0": {"default": 3, "layers": {"0-1": 2, "50-60": 1}}},
        ["k0.layers.50-60: the model has no MoE layer at 50-60"],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), BEYOND)
def test_named_layers_are_held_to_the_models_moe_layers(
    fields: dict[str, Any], expected: list[str]
) -> None:
    """A range may cover dense layers; one without MoE layers, or beyond the last, is wrong."""
    policy = OEA.model_validate({"k0": 3, **fields})
    assert problems(policy, DENSE_FIRST) == [f"{e}; its MoE layers are 1-47" for e in expected]


def test_every_size_of_a_models_layers_counts() -> None:
    """A policy must fit the layer with the smallest top_k too, and each problem is said once."""
    model = {0: Sizes(8, 64), 1: Sizes(8, 64), 2: Sizes(2, 64)}
    assert problems(TopK.model_validate({"k0": 3}), model) == [
        "k0: 3 exceeds the model's top_k of 2"
    ]


DOUBTFUL: list[tuple[type[Policy], dict[str, Any], str]] = [
    (Budget, {"max_active": 1}, "max_active: 1 is below the model's top_k of 8"),
    (Budget, {"max_active": {"default": 33, "rows": {9: 7}}}, "7 is below the model's top_k of 8"),
    (Budget, {"max_active": 8}, "max_active: 8 is close to the model's top_k of 8"),
    (Budget, {"max_active": {"default": 33, "layers": {3: 15}}}, "15 is close to the model's top"),
    (Budget, {"max_active": 64}, "max_active: 64 is all of the model's experts"),
    (OEA, {"k0": 3, "max_rank": 3}, "max_rank: 3 is not above k0"),
    (OEA, {"k0": {"default": 5, "rows": {4: 3}}, "k_max": 2}, "k_max: 2 is not above k0"),
    (TopK, {"k0": 8}, "kind: topk has no effect here"),
    (SERE, {"num_primary": 8}, "kind: sere has no effect here"),
    (Budget, {"max_active": 33, "k0": 8}, "kind: budget has no effect here"),
    (
        OEA,
        {"k0": {"default": 3, "layers": {"4-7": 8}}, "engage": {"layers": "4-7"}},
        "kind: oea has no effect here",
    ),
    (
        TopK,
        {"k0": {"default": 8, "layers": {"0-3": 2}}, "engage": {"layers": "3-5", "max_rows": 9}},
        "",
    ),
    (Budget, {"max_active": 16}, ""),
    (Budget, {"max_active": {"default": 12, "rows": {5: 28}}}, ""),
    (Budget, {"max_active": 12, "engage": {"max_rows": 8}}, ""),
    (OEA, {"k0": 3, "p": 0.5, "max_rank": 3}, ""),
    (OEA, {"k0": {"default": 8, "rows": {4: 3}}, "k_max": 5}, ""),
    (Vanilla, {}, ""),
]


@pytest.mark.parametrize(("policy", "fields", "expected"), DOUBTFUL)
def test_what_is_legal_but_of_no_use_to_a_model_is_told(
    policy: type[Policy], fields: dict[str, Any], expected: str
) -> None:
    """Budgets near top_k where many rows share them, and policies that provably never act."""
    model = {layer: Sizes(top_k=8, num_experts=64) for layer in range(8)}
    made = policy.model_validate(fields)
    assert problems(made, model) == []
    found = doubts(made, model)
    assert len(found) == bool(expected)
    assert all(expected in doubt for doubt in found)


# --- rules -------------------------------------------------------------------------------------

PRESETS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "vanilla"}, {}),
    ({"kind": "topk", "k0": 2, "compensation": 0.6}, {"k0": 2, "k_max": 2, "compensation": 0.6}),
    ({"kind": "oea", "k0": 2}, {"k0": 2}),
    (
        {"kind": "oea", "k0": 2, "p": 0.5, "k_max": 3, "max_rank": 9, "mapped_share": 0.3},
        {"k0": 2, "p": 0.5, "k_max": 3, "max_rank": 9, "mapped_share": 0.3},
    ),
    ({"kind": "sere", "num_primary": 1}, {"k0": 1, "threshold": 0.0}),
    (
        {"kind": "sere", "num_primary": 1, "threshold": -1, "compensation": 0.4},
        {"k0": 1, "threshold": -1.0, "compensation": 0.4},
    ),
    ({"kind": "budget", "max_active": 14}, {"k0": 0, "max_active": 14, "exponent": 2}),
    (
        {"kind": "budget", "max_active": 14, "k0": 1, "utility": "gate", "compensation": 0.6},
        {"k0": 1, "max_active": 14, "exponent": 1, "compensation": 0.6},
    ),
    ({"kind": "xshare", "max_active": 14}, {"k0": 1, "max_active": 14, "exponent": 1}),
    (
        {"kind": "lynx", "max_active": 14},
        {"k0": 0, "max_active": 14, "exponent": 0, "max_rank": 8},
    ),
]


@pytest.mark.parametrize(("fields", "numbers"), PRESETS)
def test_a_preset_is_these_numbers(fields: dict[str, Any], numbers: dict[str, Any]) -> None:
    """What its paper says, as numbers of the one rule."""
    policy = builtin_registry()[fields["kind"]].model_validate(fields)
    assert policy.rule(Place(layer=0, live_rows=4, top_k=8, num_experts=64)) == Rule(**numbers)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"k0": -1}, "k0"),
        ({"p": 0.0}, "p"),
        ({"exponent": 3}, "exponent"),
        ({"compensation": 1.5}, "compensation"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 0.5, "k_max": 2}, "k_max: no effect beside a threshold"),
        ({"threshold": 0.5, "mapped_share": 0.2}, "mapped_share: no effect beside a threshold"),
        ({"max_activ": 3}, "max_activ"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(numbers: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Rule(**numbers)


class Ramp(Policy):
    """A rule by a formula: as many experts as there are rows, up to 4."""

    kind: Literal["ramp"] = "ramp"
    says_so: bool = True

    def steps(self) -> set[int]:
        return {2, 3, 4} if self.says_so else {3}

    def rule(self, place: Place) -> Rule:
        return Rule(k0=min(place.live_rows, 4))


def test_a_rule_may_follow_the_live_rows_by_a_formula() -> None:
    """One row keeps one expert, two rows two each."""
    got, _, ids, _ = call([Ramp()], [0, PAD])
    assert (got.topk_ids[0] != FREE).sum() == 1
    got, _, ids, weights = call([Ramp()], [0] * 4)
    assert is_untouched(got, ids, weights)


def test_a_rule_that_changes_between_its_steps_is_refused() -> None:
    """It would be served as it was at the step below."""
    with pytest.raises(PolicyError, match="ramp has another rule at 2 live rows than at 1: add"):
        build(Ramp(says_so=False))


class Window(Policy):
    """Another rule where a window of live rows is met, of which `steps` says nothing."""

    kind: Literal["window"] = "window"
    first: int

    def rule(self, place: Place) -> Rule:
        return Rule(k0=2 if self.first <= place.live_rows <= 4 * self.first else 3)


@pytest.mark.parametrize("first", [2, 12, 100, 3000])
def test_a_rule_that_changes_for_a_while_is_refused(first: int) -> None:
    """Though it is the same at both ends."""
    with pytest.raises(PolicyError, match="window has another rule at"):
        build(Window(first=first))


class WrongSteps(Policy):
    """Says what are no numbers of rows, or cannot say any."""

    kind: Literal["wrong_steps"] = "wrong_steps"
    given: Any

    def rule(self, place: Place) -> Rule:
        return Rule(k0=1)

    def steps(self) -> set[int]:
        return {10 // self.given} if self.given == 0 else {self.given}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (-1, "`steps` has -1, expected 1 to 65535 rows"),
        (2.5, "`steps` has 2.5, expected 1 to 65535 rows"),
        (2**40, "`steps` has 1099511627776, expected 1 to 65535 rows"),
        (0, "`steps`: ZeroDivisionError"),
    ],
)
def test_steps_that_are_no_numbers_of_rows_are_refused(given: Any, expected: str) -> None:
    policy = WrongSteps(given=given)
    with pytest.raises(PolicyError, match=f"kind: wrong_steps: {expected}"):
        build(policy)
    (problem,) = problems(policy, {0: Sizes(TOP_K, NUM_EXPERTS)})
    assert expected in problem


class Unannounced(Policy):
    """Moves its slots, but names no artifact."""

    kind: Literal["unannounced"] = "unannounced"

    def rule(self, place: Place) -> Rule:
        return Rule(k0=1, threshold=0.0)


def test_a_rule_that_needs_an_artifact_must_announce_it() -> None:
    with pytest.raises(PolicyError, match="uses_similarity is False"):
        build(Unannounced())


class Failing(Policy):
    """Gives what is no rule, in one of several ways."""

    kind: Literal["failing"] = "failing"
    way: str

    def rule(self, place: Place) -> Rule:
        if self.way == "exception":
            return Rule(k0=1 // (place.live_rows - 1))
        return Rule(k0=-1) if self.way == "number" else None  # type: ignore[return-value]


NO_RULE = r"failing gives no rule at Place\(layer=0, live_rows=1, top_k=4, num_experts=8\)"


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("exception", f"{NO_RULE}: ZeroDivisionError"),
        ("number", f"{NO_RULE}: k0: Input should be greater than or equal to 0"),
        ("none", f"{NO_RULE} but None"),
    ],
)
def test_a_policy_that_gives_no_rule_is_refused_with_the_place(way: str, expected: str) -> None:
    """While its table is built, and before, when it is held to a model."""
    policy = Failing(way=way)
    with pytest.raises(PolicyError, match=expected):
        build(policy)
    (problem,) = problems(policy, {0: Sizes(TOP_K, NUM_EXPERTS)})
    assert re.search(expected, problem)


@pytest.mark.parametrize("policy", [Ramp(says_so=False), Unannounced()])
def test_a_wrong_rule_is_told_when_a_policy_is_held_to_a_model(policy: Policy) -> None:
    """`check` says what a server would."""
    with pytest.raises(PolicyError) as refused:
        build(policy)
    assert str(refused.value) in problems(policy, {0: Sizes(TOP_K, NUM_EXPERTS)})


def test_the_words_of_a_table_are_those_of_the_kernels() -> None:
    """Names, order and types of `Policy` and the bits of `Flag`, as the C++ header states them."""
    header = (ROOT / "csrc/include/moe_routing/call.h").read_text()
    body = re.search(r"struct Policy \{(.*?)\n\};", header, re.DOTALL)
    assert body is not None
    fields = re.findall(r"^  (int32_t|float) (\w+);", body[1], re.MULTILINE)
    assert tuple(name for _, name in fields) == WORDS
    assert {name for kind, name in fields if kind == "float"} == FLOATS
    flags = re.search(r"enum Flag : int32_t \{(.*?)\n\};", header, re.DOTALL)
    assert flags is not None
    values = re.findall(r"k(\w+) = (\d+),", flags[1])
    assert {name.lower(): int(value) for name, value in values} == {
        flag.name.lower().replace("_", ""): flag.value for flag in Flag if flag.name
    }


# --- tables ------------------------------------------------------------------------------------


def call(
    policies: list[Policy],
    plan: list[int],
    *,
    layer: int = 0,
    similarity: dict[str, Tensor] | None = None,
    artifacts: list[str | None] | None = None,
    seed: int = 0,
) -> tuple[Rerouted, Tensor, Tensor, Tensor]:
    """Route one random call under `policies`; returns the outcome, scores, ids and weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(plan), NUM_EXPERTS, generator=generator)
    weights, ids = scores.softmax(dim=1).topk(TOP_K, dim=1)
    ids, weights = ids.flip(1), weights.flip(1)  # the engine's order need not be by rank
    table = build_table(
        policies,
        layer=layer,
        top_k=TOP_K,
        num_experts=NUM_EXPERTS,
        similarity=similarity,
        artifacts=artifacts,
    )
    got = reroute(
        scores, scores.softmax(dim=1), ids, weights, torch.tensor(plan), table, renormalize=True
    )
    return got, scores, ids, weights


def is_untouched(got: Rerouted, ids: Tensor, weights: Tensor, rows: slice = slice(None)) -> bool:
    same_bits = torch.equal(
        got.topk_weights[rows].view(torch.int32), weights[rows].view(torch.int32)
    )
    return torch.equal(got.topk_ids[rows], ids[rows]) and same_bits


@pytest.mark.parametrize("num_live", range(1, 8))
@pytest.mark.parametrize("policy", [TopK, OEA, SERE])
def test_outside_its_range_a_policy_is_vanilla(policy: type[Policy], num_live: int) -> None:
    """Live rows outside [min_rows, max_rows] leave every row bit for bit; padding is no row."""
    name = "num_primary" if policy is SERE else "k0"
    made = policy.model_validate({name: 1, "engage": {"min_rows": 3, "max_rows": 5}})
    got, _, ids, weights = call(
        [made], [0] * num_live + [PAD] * 3, similarity={"a": torch.eye(8)}, artifacts=["a"]
    )
    live = slice(0, num_live)
    assert is_untouched(got, ids, weights, live) is (num_live not in (3, 4, 5))


@pytest.mark.parametrize("layer", range(4))
def test_on_other_layers_a_policy_is_vanilla(layer: int) -> None:
    """A layer that the policy does not name keeps the model's routing."""
    made = OEA.model_validate({"k0": 1, "engage": {"layers": "1,3"}})
    got, _, ids, weights = call([made], [0, 0, 0], layer=layer)
    assert is_untouched(got, ids, weights) is (layer not in (1, 3))


def test_rows_of_a_disengaged_policy_still_load_all_their_experts() -> None:
    """Outside its range a policy counts as vanilla for the batch union too."""
    off = TopK.model_validate({"k0": 1, "engage": {"min_rows": 100}})
    got, _, ids, _ = call([off, TopK.model_validate({"k0": 1})], [0, 1])
    assert set(ids[0].tolist()) <= set(got.union.nonzero().flatten().tolist())


def test_a_step_that_reaches_k_is_vanilla_bit_for_bit() -> None:
    """With k0 = k at 2 live rows and k0 = 1 from 3 on, 2 rows pass and 3 do not."""
    made = TopK.model_validate({"k0": {"default": TOP_K, "rows": {3: 1}}})
    got, _, ids, weights = call([made], [0, 0, PAD])
    assert is_untouched(got, ids, weights, slice(0, 2))
    got, _, ids, weights = call([made], [0, 0, 0])
    assert not is_untouched(got, ids, weights)
    assert (got.topk_ids[:, 1:] == FREE).all()


@st.composite
def scheduled(draw: st.DrawFn) -> dict[str, Any]:
    """A k0 schedule with steps and layers, and an engagement, as plain data."""
    engage: dict[str, Any] = {"min_rows": draw(st.integers(1, 6))}
    if draw(st.booleans()):
        engage["max_rows"] = draw(st.integers(engage["min_rows"], 9))
    if draw(st.booleans()):
        engage["layers"] = draw(st.lists(st.integers(0, 2), min_size=1))
    count = st.integers(1, TOP_K)
    starts = st.integers(engage["min_rows"], engage.get("max_rows", 9))
    layers = st.sampled_from(engage.get("layers", [0, 1, 2]))
    k0 = {
        "default": draw(count),
        "rows": draw(st.dictionaries(starts, count, max_size=3)),
        "layers": draw(st.dictionaries(layers, count, max_size=2)),
    }
    return {"k0": k0, "engage": engage}


def resolved(fields: dict[str, Any], layer: int, num_live: int) -> oracle.Numbers:
    """What these fields mean on this layer at this number of live rows, spelled out."""
    engage, k0 = fields["engage"], fields["k0"]
    too_few = num_live < engage["min_rows"]
    too_many = "max_rows" in engage and num_live > engage["max_rows"]
    elsewhere = "layers" in engage and layer not in engage["layers"]
    if too_few or too_many or elsewhere:
        return {}
    value = k0["default"]
    for start in sorted(k0["rows"]):
        if num_live >= start:
            value = k0["rows"][start]
    value = k0["layers"].get(layer, value)
    return {"k0": value}


@settings(max_examples=150, deadline=None, database=None)
@given(
    st.lists(scheduled(), min_size=1, max_size=3),
    st.lists(st.integers(-1, 2), max_size=12),
    st.integers(0, 2),
    st.integers(0, 1000),
)
def test_schedules_follow_the_live_rows_of_the_call(
    policies: list[dict[str, Any]], plan: list[int], layer: int, seed: int
) -> None:
    """Every row routes as under its policy's values for this layer and this many live rows."""
    plan = [i if i == PAD else i % len(policies) for i in plan]
    got, scores, ids, weights = call(
        [OEA.model_validate(fields) for fields in policies], plan, layer=layer, seed=seed
    )
    num_live = sum(i != PAD for i in plan)
    expected = oracle.reroute(
        scores.numpy(),
        scores.softmax(dim=1).numpy(),
        ids.numpy(),
        weights.numpy(),
        [None if i == PAD else resolved(policies[i], layer, num_live) for i in plan],
        renormalize=True,
    )
    assert got.topk_ids.tolist() == expected.ids.tolist()
    assert got.active.item() == expected.distinct
    # a few float32 roundings of at most 4 addends, at 2**-24 each
    torch.testing.assert_close(
        got.topk_weights.double(), torch.from_numpy(expected.weights), rtol=1e-6, atol=0
    )


def build(policy: Policy, **more: Any) -> None:
    build_table([Vanilla(), policy], layer=0, top_k=TOP_K, num_experts=NUM_EXPERTS, **more)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (TopK.model_validate({"k0": 5}), "k0: 5 exceeds the model's top_k of 4"),
        (OEA.model_validate({"k0": 6}), "k0: 6 exceeds the model's top_k of 4"),
        (OEA.model_validate({"k0": 1, "k_max": 7}), "k_max: 7 exceeds the model's top_k of 4"),
        (OEA.model_validate({"k0": 1, "max_rank": 9}), "max_rank: 9 exceeds .* experts of 8"),
        (TopK.model_validate({"k0": {"default": 1, "rows": {99: 8}}}), "k0: 8 exceeds"),
        (OEA.model_validate({"k0": {"default": 1, "layers": {99: 8}}}), "k0: 8 exceeds"),
        (SERE.model_validate({"num_primary": 9}), "num_primary: 9 exceeds .* top_k of 4"),
    ],
)
def test_a_number_that_exceeds_the_router_is_refused(policy: Policy, message: str) -> None:
    """A value above what the model routes to is refused, on whatever layer or step it is."""
    with pytest.raises(PolicyError, match=message):
        build(policy, similarity={"a": torch.eye(8)}, artifacts=[None, "a"])


def test_every_problem_of_a_policy_is_named_at_once() -> None:
    """Several wrong values are reported in one message."""
    with pytest.raises(PolicyError, match=r"k0: 5 .*k_max: 6 .*max_rank: 9 "):
        build(OEA.model_validate({"k0": 5, "k_max": 6, "max_rank": 9}))


@pytest.mark.parametrize("artifact", [None, "code"])
def test_sere_without_its_artifact_is_refused(artifact: str | None) -> None:
    """A sere policy whose artifact is missing is refused with the artifacts there are."""
    sere = SERE.model_validate({"num_primary": 1})
    with pytest.raises(PolicyError, match=rf"no artifact {artifact!r} .*known: chat, math"):
        build(
            sere,
            similarity={"chat": torch.eye(8), "math": torch.eye(8)},
            artifacts=[None, artifact],
        )
    with pytest.raises(PolicyError, match="known: none"):
        build(sere, artifacts=[None, artifact])


def test_values_up_to_the_size_of_the_router_are_accepted() -> None:
    """k0 = k_max = top_k and max_rank = N are the largest values that fit."""
    build(OEA.model_validate({"k0": 4, "k_max": 4, "max_rank": 8}))


# --- third-party policies ----------------------------------------------------------------------


def test_a_third_party_policy_works_in_a_mixed_batch() -> None:
    """A foreign kind routes its own rows, feeds U, and leaves the other rows their rules."""
    policies: list[Policy] = [Vanilla(), Mirror(), OEA.model_validate({"k0": 1})]
    got, scores, ids, weights = call(policies, [0, 1, 2, PAD, 1])
    assert is_untouched(got, ids, weights, slice(0, 1))
    for row in (1, 4):
        assert got.topk_ids[row].tolist() == [7 - j for j in ids[row].tolist()]
        assert got.topk_weights[row].tolist() == [3.0] * TOP_K
    order = scores[2].argsort(descending=True).tolist()
    union = set(ids[0].tolist()) | {7 - j for row in (1, 4) for j in ids[row].tolist()}
    union.add(order[0])
    assert set(got.union.nonzero().flatten().tolist()) == union
    shared = [j for j in order if j in union][:TOP_K]
    base_first = sorted(shared, key=lambda j: j not in ids[2].tolist())
    assert got.topk_ids[2].tolist() == base_first
    assert got.topk_ids[3].tolist() == [FREE] * TOP_K
    assert not got.topk_weights[3].any()


def test_a_third_party_policy_obeys_its_engagement() -> None:
    """Engagement works for a foreign kind without a line of its own code."""
    mirror = Mirror.model_validate({"engage": {"min_rows": 2}})
    got, _, ids, weights = call([mirror], [0, PAD])
    assert is_untouched(got, ids, weights, slice(0, 1))
    got, _, ids, weights = call([mirror], [0, 0])
    assert torch.equal(got.topk_ids, 7 - ids)


def test_a_policy_without_passes_says_so() -> None:
    """A kind that overrides neither pass fails when it is used, not silently."""

    class Unfinished(Policy):
        kind: Literal["unfinished"] = "unfinished"

    with pytest.raises(PolicyError, match="Unfinished defines no rule"):
        call([Unfinished()], [0])


@pytest.mark.parametrize("kind", ["oea", "budget"])
def test_an_artifact_that_nothing_uses_is_refused(kind: str) -> None:
    """A similarity without a mapped share would be ignored in silence."""
    policy = builtin_registry()[kind]
    size = {"k0": 2} if kind == "oea" else {"max_active": 20}
    with pytest.raises(ValidationError, match="'x' has no effect without a mapped_share above 0"):
        policy.model_validate({**size, "similarity": "x"})
    mapped = policy.model_validate({**size, "similarity": "x", "mapped_share": 0.3})
    assert mapped.uses_similarity
    assert not policy.model_validate(size).uses_similarity
