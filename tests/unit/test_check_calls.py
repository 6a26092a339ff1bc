"""What `check_calls` lets pass of recorded calls, and what it says of others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_moe_routing import environment
from sglang_moe_routing.artifacts import SimilarityArtifact
from sglang_moe_routing.errors import CheckError
from sglang_moe_routing.policies import (
    PAD,
    FreeSlots,
    Policy,
    Router,
    Rows,
    TorchPolicy,
    build_table,
    builtin_registry,
    reroute,
)
from sglang_moe_routing.runtime.definitions import Definition
from sglang_moe_routing.runtime.plan import Layer
from sglang_moe_routing.runtime.recorder import Recorder
from sglang_moe_routing.testing import check_calls, oracle, read_records

TOP_K, NUM_EXPERTS = 4, 80
POLICIES: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "vanilla"},
    "topk": {"kind": "topk", "k0": 2, "compensation": 0.5},
    "oea": {"kind": "oea", "k0": 3, "p": 0.6, "k_max": 3, "max_rank": 9},
    "mapped": {"kind": "oea", "k0": 1, "mapped_share": 0.3},
    "sere": {"kind": "sere", "num_primary": 1, "threshold": 0.8},
    "scaled": {"kind": "sere", "num_primary": 1, "threshold": 0.5},
    "budget": {"kind": "budget", "max_active": 9, "compensation": 0.6},
    "xshare": {"kind": "xshare", "max_active": 9},
    "lynx": {"kind": "lynx", "max_active": 9},
    "late": {"kind": "topk", "k0": 1, "engage": {"min_rows": 100}},
}
RULES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "topk": {"k0": 2, "k_max": 2, "compensation": 0.5},
    "oea": {"k0": 3, "p": 0.6, "k_max": 3, "max_rank": 9},
    "mapped": {"k0": 1, "mapped_share": 0.3, "similarity": "digest"},
    "sere": {"k0": 1, "threshold": 0.8, "similarity": "digest"},
    "scaled": {"k0": 1, "threshold": 0.5, "similarity": "scales"},
    "budget": {"k0": 0, "max_active": 9, "compensation": 0.6},
    "xshare": {"k0": 1, "max_active": 9, "exponent": 1},
    "lynx": {"k0": 0, "max_active": 9, "exponent": 0, "max_rank": TOP_K},
    "late": {},
}
NAMES = [*POLICIES]
ROWS = [*NAMES, None, *NAMES]
BIAS = torch.linspace(-0.1, 0.1, NUM_EXPERTS)
ROUTERS = {
    "softmax": Router(),
    "raw sigmoid": Router(scoring="sigmoid", renormalize=False, scale=2.5, bias=BIAS),
    "groups": Router(scoring="sqrtsoftplus", bias=BIAS, num_groups=4, top_groups=2),
}


class Recording:
    """Calls under POLICIES, routed by the reference and written down by the recorder."""

    def __init__(self, folder: Path, router: Router, free_slots: FreeSlots) -> None:
        generator = torch.Generator().manual_seed(0)
        one, two = torch.rand(2, NUM_EXPERTS, NUM_EXPERTS, generator=generator)
        plain = SimilarityArtifact({0: one, 1: two}, "routed", "", sha256="digest")
        scales = replace(plain, coefficients={0: two, 1: one}, sha256="scales")
        self.artifacts = {"mapped": plain, "sere": plain, "scaled": scales}
        self.policies: list[Policy] = [
            builtin_registry()[given["kind"]].model_validate(given) for given in POLICIES.values()
        ]
        self.definitions = [
            Definition(name, policy, self.artifacts.get(name), "")
            for name, policy in zip(POLICIES, self.policies, strict=True)
        ]
        self.layers = [
            Layer(
                layer_id=number,
                index=number,
                num_experts=NUM_EXPERTS,
                top_k=TOP_K,
                router=router,
                free_slots=free_slots,
                table=build_table(
                    self.policies,
                    layer=number,
                    top_k=TOP_K,
                    num_experts=NUM_EXPERTS,
                    similarity={a.sha256: a.matrices[number] for a in (plain, scales)},
                    coefficients={"scales": scales.coefficients[number]},
                    artifacts=[d.artifact and d.artifact.sha256 for d in self.definitions],
                ),
                has_kernels=False,
                union=torch.zeros(NUM_EXPERTS, dtype=torch.bool),
            )
            for number in (0, 1)
        ]
        self.folder = folder
        recorder = Recorder.from_environment(self.definitions, self.layers)
        assert recorder is not None
        self.recorder = recorder

    def run(self, rows: list[str | None] = ROWS, seed: int = 0) -> list[dict[str, Any]]:
        """One forward through both layers, as it is read back."""
        self.folder.mkdir()
        policy_ids = torch.tensor([PAD if name is None else NAMES.index(name) for name in rows])
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            logits = torch.randn(len(rows), NUM_EXPERTS, generator=generator)
            scores, gates = layer.router.score(logits)
            ids = scores.topk(TOP_K).indices.flip(1)
            weights = gates.gather(1, ids)
            if layer.router.renormalize:
                weights = weights / weights.sum(dim=1, keepdim=True)
            weights = weights * layer.router.scale
            done = reroute(
                scores,
                gates,
                ids,
                weights,
                policy_ids,
                layer.table,
                renormalize=layer.router.renormalize,
                scale=layer.router.scale,
                free_slots=layer.free_slots,
            )
            after = done.topk_ids, done.topk_weights, done.union
            self.recorder.record(layer, None, policy_ids, logits, (ids, weights), after)
        calls = list(read_records(self.folder))
        shutil.rmtree(self.folder)
        return calls


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recording]:
    def make(
        router: Router = ROUTERS["softmax"], free_slots: FreeSlots = FreeSlots.IGNORED
    ) -> Recording:
        monkeypatch.setenv(environment.RECORD, str(tmp_path / "records"))
        return Recording(tmp_path / "records", router, free_slots)

    return make


@pytest.mark.parametrize("free_slots", FreeSlots)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_calls_of_every_kind_pass(
    record: Callable[..., Recording], router: Router, free_slots: FreeSlots
) -> None:
    calls = record(router, free_slots).run()
    checked = check_calls(calls)
    assert checked.num_calls == 2
    assert checked.rows == dict.fromkeys(NAMES, 4)
    ids = [[call[which] for call in calls] for which in ("final_ids", "base_ids")]
    final, base = (
        [{j for row, name in zip(rows, ROWS, strict=True) if name for j in row} for rows in calls]
        for calls in ids
    )
    assert checked.active_experts == sum(len(held - {-1}) for held in final) / 2
    assert checked.active_experts_base == sum(map(len, base)) / 2


def test_a_record_says_which_rule_was_in_force(record: Callable[..., Recording]) -> None:
    recording = record()
    for call in recording.run():
        assert call["rules"] == [None if name is None else RULES[name] for name in ROWS]
        matrix = recording.artifacts["sere"].matrices[call["layer"]].tolist()
        factors = recording.artifacts["scaled"].coefficients[call["layer"]].tolist()
        assert call["similarity"] == {
            "digest": {"similarity": matrix},
            "scales": {"similarity": matrix, "coefficients": factors},
        }


def test_matrices_are_in_every_folder_anew(record: Callable[..., Recording]) -> None:
    """The folder is emptied between recordings; a call without them may come first."""
    recording = record()
    recording.run()
    assert not any(call["similarity"] for call in recording.run(["topk"]))
    assert check_calls(recording.run()).num_calls == 2


def test_nothing_recorded_is_nothing_checked() -> None:
    assert check_calls([]).num_calls == 0


def change(name: str, row: str | None, column: int, value: Any) -> Callable[..., None]:
    """One number of the record, in the second row of a policy, or of the padded one."""

    def apply(call: dict[str, Any]) -> None:
        b = ROWS.index(row) if row is None else ROWS.index(row, len(NAMES))
        cells = call[name][b]
        cells[column] = value(cells) if callable(value) else value

    return apply


def change_rule(row: str, name: str, value: Any) -> Callable[..., None]:
    def apply(call: dict[str, Any]) -> None:
        rules = zip(ROWS, call["rules"], strict=True)
        call["rules"] = [{**rule, name: value} if n == row else rule for n, rule in rules]

    return apply


def more_in_union(call: dict[str, Any]) -> None:
    call["union"] = sorted({*call["union"], min(set(range(NUM_EXPERTS)) - {*call["union"]})})


PLANTED: dict[str, tuple[Callable[..., None], str]] = {
    "a vanilla weight is one unit off": (
        change("final_weights", "vanilla", 0, lambda w: float(np.nextafter(np.float32(w[0]), 2))),
        r"row 11 \(vanilla\): weighs .* unchanged",
    ),
    "a vanilla expert is another": (
        change("final_ids", "vanilla", 0, lambda ids: min(set(range(NUM_EXPERTS)) - {*ids})),
        r"row 11 \(vanilla\): has the experts .*, expected",
    ),
    "a rule out of force is followed": (
        change("final_ids", "late", 3, -1),
        r"row 20 \(late\): has",
    ),
    "an expert stands there twice": (
        change("final_ids", "oea", 1, lambda ids: ids[0]),
        r"row 13 \(oea\): has the experts \[(\d+), \1, ",
    ),
    "experts are in another order": (
        lambda call: call["final_ids"][12].__setitem__(slice(0, 2), call["final_ids"][12][1::-1]),
        r"row 12 \(topk\): has the experts",
    ),
    "a weight is off": (
        change("final_weights", "budget", 0, lambda weights: weights[0] + 1e-4),
        r"row 17 \(budget\): final_weights .*, expected",
    ),
    "a free slot weighs": (change("final_weights", "topk", 3, 0.1), r"row 12 \(topk\): final_wei"),
    "a padded row has an expert": (change("final_ids", None, 0, 3), r"row 10 \(padding\): has"),
    "a padded row weighs": (
        change("final_weights", None, 0, 5e-8),
        r"row 10 \(padding\): weighs .*, expected nothing",
    ),
    "a row has a rule and no name": (
        lambda call: call["rows"].__setitem__(11, None),
        r"row 11 \(padding\): has the rule \{\}",
    ),
    "a row has a name and no rule": (
        lambda call: call["rules"].__setitem__(12, None),
        r"row 12 \(topk\): has the rule None",
    ),
    "there are experts of one row more": (
        lambda call: call["final_ids"].append(call["final_ids"][0]),
        "final_ids of 22 rows, expected 21",
    ),
    "there are logits of one row less": (
        lambda call: call["router_logits"].pop(),
        "router_logits of 20 rows, expected 21",
    ),
    "the union has one more": (more_in_union, r"the union is \[.*, expected \["),
    "the union lacks one": (lambda call: call["union"].pop(), "the union is"),
    "the router did not choose this": (
        change("base_ids", "xshare", 0, lambda ids: min(set(range(NUM_EXPERTS)) - {*ids})),
        r"row 18 \(xshare\): the router chose",
    ),
    "the router does not weigh like this": (
        change("base_weights", "lynx", 0, 0.9),
        r"row 19 \(lynx\): base_weights",
    ),
    "another max_rank": (change_rule("xshare", "max_rank", 4), r"row \d+ \(xshare\): has"),
    "another budget": (change_rule("budget", "max_active", 24), "the union is"),
    "another compensation": (
        change_rule("topk", "compensation", 0.6),
        r"row \d+ \(topk\): final_w",
    ),
    "another share": (change_rule("mapped", "mapped_share", 0.4), r"row \d+ \(mapped\): final_w"),
    "another threshold": (change_rule("sere", "threshold", 1.1), r"row \d+ \(sere\): has"),
    "no rule": (
        change_rule("oea", "torch", "min_p"),
        r"row \d+ \(oea\): .* in torch \(kind min_p\)",
    ),
}


@pytest.mark.parametrize(("plant", "message"), PLANTED.values(), ids=PLANTED)
def test_what_broke_its_rule_is_named(
    record: Callable[..., Recording], plant: Callable[..., None], message: str
) -> None:
    first, call = record().run()
    plant(call)
    with pytest.raises(CheckError, match=rf"^call 1, layer 1, GRAPH: {message}"):
        check_calls([first, call])


def test_weights_may_be_off_by_rounding(record: Callable[..., Recording]) -> None:
    _, call = record().run()
    change("final_weights", "budget", 0, lambda weights: weights[0] * (1 + 1e-6))(call)
    assert check_calls([call]).num_calls == 1


def test_a_policy_in_torch_is_recorded_by_its_kind(record: Callable[..., Recording]) -> None:
    class Same(TorchPolicy):
        kind: Any = "same"

        def required(self, rows: Rows) -> torch.Tensor:
            return rows.chosen

    recording = record()
    old = recording.definitions[1]
    recording.definitions[1] = Definition(old.name, Same(), None, "")
    assert recording.run()[0]["rules"][1] == {"torch": "same"}


def masses(call: dict[str, Any]) -> Iterator[tuple[int, float]]:
    """For every row, the share of the gate mass of its two best experts."""
    for b, logits in enumerate(call["router_logits"]):
        gates = np.sort(np.exp(np.array(logits)))[::-1]
        yield b, gates[:2].sum() / gates.sum()


@pytest.mark.parametrize(("distance", "passes"), [(-5e-7, True), (5e-7, True), (1e-4, False)])
def test_a_mass_close_to_p_may_count_either_way(
    record: Callable[..., Recording], distance: float, passes: bool
) -> None:
    """Of the first row alone: it required two experts, as p lies just below what they hold."""
    call = record().run(["oea"])[0]
    call["rules"][0] = {"k0": 4, "p": dict(masses(call))[0] + distance}
    ids = call["base_ids"][0][:1:-1]
    weights = np.array(call["base_weights"][0][:1:-1])
    call["final_ids"] = [[*ids, -1, -1]]
    call["final_weights"] = [[*(weights / weights.sum()).tolist(), 0, 0]]
    call["union"] = sorted(ids)
    if passes:
        assert check_calls([call]).rows == {"oea": 1}
    else:
        with pytest.raises(CheckError, match="the union is"):
            check_calls([call])


def rows_of(*gates: list[float], max_active: int, k0: int = 0) -> list[oracle.Row]:
    """Rows that ask for their two best of these gates."""
    found = []
    for row in np.array(gates):
        ids = np.argsort(-row)[:2]
        found.append(oracle.Row(row, row, ids, row[ids], {"k0": k0, "max_active": max_active}))
    return found


@pytest.mark.parametrize(
    ("found", "is_close", "is_far"),
    [
        ({0, 1}, True, False),
        ({0, 2}, True, True),
        ({0, 1, 2}, False, False),  # one too many
        ({0}, False, False),
        ({1, 2}, False, False),  # 0 is worth more than either
        ({0, 3}, False, False),
    ],
)
def test_demands_that_rounding_decides_may_rank_either_way(
    found: set[int], is_close: bool, is_far: bool
) -> None:
    """Experts 1 and 2 are worth 20,000.49 and 20,000.51 quanta, or 21,000; 0 is worth more."""
    one, two, far = (math.sqrt(quanta / 65536) for quanta in (20000.49, 20000.51, 21000))
    close = rows_of([1 - one, one, 0, 0], [1 - two, 0, two, 0], max_active=2)
    assert oracle.union_of(close) == {0, 2}
    assert oracle.may_be_union(found, close, 2e-5) is is_close
    apart = rows_of([1 - one, one, 0, 0], [1 - far, 0, far, 0], max_active=2)
    assert oracle.may_be_union(found, apart, 2e-5) is is_far


def test_what_a_row_requires_takes_no_place_that_it_has_in_demand() -> None:
    """Expert 0 is required and most wanted: a budget of 1 adds nobody."""
    rows = rows_of([0.8, 0.2, 0.0], max_active=1, k0=1)
    assert oracle.union_of(rows) == {0}
    assert oracle.may_be_union({0}, rows, 2e-5)
    assert not oracle.may_be_union({0, 1}, rows, 2e-5)
