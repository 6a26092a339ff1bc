"""What `check_policy` lets pass, and what it says of policies that break a promise each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.errors import CheckError
from sglang_moe_routing.policies import (
    Engagement,
    Place,
    Policy,
    Rows,
    Rule,
    TorchPolicy,
    builtin_registry,
    reference,
)
from sglang_moe_routing.testing import check_policy
from tests import examples

Fields = dict[str, Any]


def weights(draw: random.Random) -> Fields:
    return {
        "compensation": draw.choice((None, 0.0, 0.6, 1.0)),
        "mapped_share": draw.choice((0.0, 0.3)),
    }


RANDOM: dict[str, Callable[[random.Random], Fields]] = {
    "vanilla": lambda draw: {},
    "topk": lambda draw: {"k0": draw.randint(1, 8), "compensation": draw.choice((None, 0.4))},
    "oea": lambda draw: {
        "k0": {"default": draw.randint(1, 4), "rows": {4: draw.randint(1, 8)}},
        "p": draw.choice((0.3, 0.7, 1.0)),
        "k_max": draw.choice((None, 5)),
        "max_rank": draw.choice((None, 12)),
        **weights(draw),
    },
    "sere": lambda draw: {
        "num_primary": draw.randint(1, 4),
        "threshold": draw.uniform(0, 1),
        "compensation": draw.choice((None, 0.5)),
    },
    "budget": lambda draw: {
        "max_active": {"default": draw.randint(4, 24), "layers": {"1": 12}},
        "k0": draw.randint(0, 3),
        "utility": draw.choice(("gate", "squared_gate")),
        **weights(draw),
    },
    "xshare": lambda draw: {"max_active": draw.randint(4, 40), **weights(draw)},
    "lynx": lambda draw: {"max_active": draw.randint(4, 40), **weights(draw)},
}


def test_every_built_in_kind_is_drawn() -> None:
    assert set(RANDOM) == set(builtin_registry())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", RANDOM)
def test_built_in_kinds_pass_with_any_parameters(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    engage = {} if kind == "vanilla" else {"engage": Engagement(min_rows=draw.choice((1, 3)))}
    check_policy(builtin_registry()[kind].model_validate({**RANDOM[kind](draw), **engage}))


def test_foreign_kinds_pass() -> None:
    check_policy(examples.example_class().model_validate({"share": 0.05}))
    check_policy(MinP())


class Ruled(Policy):
    kind: Any = "bad"

    def rule(self, place: Place) -> Rule:
        return Rule(k0=2)


class MinP(TorchPolicy):
    """That of the page."""

    kind: Any = "bad"

    def required(self, rows: Rows) -> Tensor:
        best = rows.gates.gather(1, rows.order[:, :1])
        return rows.chosen & (rows.gates >= 0.1 * best)

    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.take(self.required(rows))


class StepsForgotten(Ruled):
    def rule(self, place: Place) -> Rule:
        return Rule(k0=1 if place.live_rows == 700 else 2)


class MoodyRule(Ruled):
    def rule(self, place: Place) -> Rule:
        return Rule(k0=random.randint(0, 7))


class SimilarityForgotten(Ruled):
    def rule(self, place: Place) -> Rule:
        return Rule(k0=1, threshold=0.5)


class ByZero(Ruled):
    part: int = 3

    def rule(self, place: Place) -> Rule:
        return Rule(k0=1 + 3 // self.part)


class OnlyFull(MinP):
    def required(self, rows: Rows) -> Tensor:
        return rows.chosen & (rows.gates >= 0.1 * rows.gates.max())


class Reads(MinP):
    def required(self, rows: Rows) -> Tensor:
        return rows.chosen & (rows.gates >= (0.1 if rows.mine.any() else 0.2))


class Masks(MinP):
    def required(self, rows: Rows) -> Tensor:
        required = rows.chosen.clone()
        required[rows.mine.nonzero()] = True
        return required & rows.chosen


class Copies(MinP):
    def required(self, rows: Rows) -> Tensor:
        return rows.chosen.cpu().to(rows.mine.device)


class Elsewhere(MinP):
    def required(self, rows: Rows) -> Tensor:
        return rows.chosen & (torch.arange(rows.num_experts) >= 0)


class OutOfRange(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids + rows.num_experts, rows.topk_weights


class OneColumn(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids[:, :1], rows.topk_weights


class Unguarded(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        weights = rows.gates.gather(1, rows.topk_ids)
        return rows.topk_ids, weights / weights.sum(dim=1, keepdim=True)


class Negative(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids, rows.topk_weights - 0.5


class Generous(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids, rows.topk_weights * 1.5


class Meddling(MinP):
    def required(self, rows: Rows) -> Tensor:
        rows.gates.mul_(rows.gates)
        return rows.chosen


class ByTheBatch(MinP):
    def required(self, rows: Rows) -> Tensor:
        return rows.chosen & (rows.gates >= rows.gates.mean())

    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.take(self.required(rows))


class Moody(MinP):
    def reroute(self, rows: Rows, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids, rows.topk_weights * torch.rand(())


PLANTED: list[tuple[Policy, str]] = [
    (StepsForgotten(), "layer 0: the rule at 700 live rows differs .*: add 700 to `steps`"),
    (MoodyRule(), "layer 0: the rule at 1 live rows is .* when asked again"),
    (SimilarityForgotten(), "layer 0: .* its uses_similarity is False"),
    (ByZero(), "with part: 0, layer 0: .*ZeroDivisionError"),
    (OnlyFull(), "layer 0, no rows: .*Error: max"),
    (Reads(), "captured in a graph: reads a tensor on the host, which waits: aten._local_scalar"),
    (Masks(), "captured in a graph: has a shape that depends on contents: aten.nonzero"),
    (Copies(), "captured in a graph: copies between the device and the host"),
    (Elsewhere(), "captured in a graph: .*found at least two devices, c"),
    (OutOfRange(), r"layer 0, a mixed batch: row 0 holds \[\d\d+, .* no distinct experts below 64"),
    (OneColumn(), r"layer 0, a mixed batch: row 0 holds \[(\d+), \1, .* no distinct experts"),
    (Unguarded(), r"layer 0, NaN logits: row \d weighs \[nan, .* expected finite weights from 0"),
    (Negative(), r"layer 0, a mixed batch: row 0 weighs .*, -0\.\d+.* expected finite weights"),
    (Generous(), r"layer 0, a mixed batch: row 0 weighs 1\.\d+ in all, the model's own are 1\.0"),
    (Meddling(), "layer 0, a mixed batch: rows of other policies are not what they are without it"),
    (ByTheBatch(), "layer 0, .*: a padded row changes what other rows get"),
    (Moody(), "layer 0, a mixed batch: the same call gives something else when it is made again"),
]


@pytest.mark.parametrize(("policy", "message"), PLANTED, ids=lambda x: type(x).__name__)
def test_a_broken_promise_is_named(policy: Policy, message: str) -> None:
    with pytest.raises(CheckError, match=rf"^policy of kind bad[,]? {message}"):
        check_policy(policy)


class Forgetful(examples.example_class()):  # type: ignore[misc]  # made at run time
    def steps(self) -> set[int]:
        return set()


@pytest.mark.parametrize("policy", [Forgetful(share=0.05), Reads(), ByTheBatch()], ids=repr)
def test_messages_are_what_the_page_prints(policy: Policy) -> None:
    with pytest.raises(CheckError) as refused:
        check_policy(policy)
    message = str(refused.value).replace("kind bad", "kind min_p")
    assert f"\n{message}\n" in examples.PAGE.read_text()


@pytest.mark.parametrize("part", ["ties", "NaN"])
def test_a_reference_that_breaks_the_rule_is_found(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and weights of a rule's rows are held to the oracle, odd numbers included."""
    kept = reference._preference

    def wrong(scores: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if part == "ties":
            scores = scores - torch.arange(scores.shape[1], 0, -1) * 1e-6
        return kept(scores.nan_to_num(nan=9.0) if part == "NaN" else scores, base)

    monkeypatch.setattr(reference, "_preference", wrong)
    budget = builtin_registry()["budget"].model_validate({"max_active": 12})
    with pytest.raises(CheckError, match=f"layer 0, {part}.*: (the union is|row)"):
        check_policy(budget)


def test_sizes_and_layers_are_the_callers() -> None:
    class Large(Ruled):
        kind: Literal["large"] = "large"

        def rule(self, place: Place) -> Rule:
            if place.layer == 7 and place.top_k == 4:
                raise ValueError(f"no rule with {place.num_experts} experts")
            return Rule(k0=2)

    check_policy(Large(), top_k=6, num_experts=40, layers=[7])
    with pytest.raises(CheckError, match=r"layer 7: .* no rule with 32 experts"):
        check_policy(Large(), top_k=4, num_experts=32, layers=[7])
