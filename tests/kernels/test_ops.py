"""The compiled re-routing as Python calls it: clear errors, room for reloads, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.errors import PolicyError
from sglang_moe_routing.kernels import (
    MAX_EXPERTS,
    MAX_GROUPS,
    MAX_ROWS,
    MAX_TOP_K,
    NOT_COUNTED,
    BoundLayer,
    beyond_limits,
    choose,
    ops,
    refine,
)
from sglang_moe_routing.policies import (
    FREE,
    OEA,
    PAD,
    SERE,
    Budget,
    Capacity,
    Engagement,
    Policy,
    PolicyTable,
    Router,
    TopK,
    Vanilla,
    build_table,
    with_capacity,
)
from tests.cases import policy_ids, to_policy, varied_case
from tests.kernels import building

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUM_TOKENS, NUM_EXPERTS, TOP_K = 6, 16, 4

pytestmark = pytest.mark.skipif(
    not choose("cpu").is_native, reason=f"no compiled kernels: {choose('cpu').reason}"
)


def make_table(device: str = "cpu", num_experts: int = NUM_EXPERTS) -> PolicyTable:
    policies: list[Policy] = [Vanilla(), TopK.model_validate({"k0": 2}), OEA(k0=2)]
    return build_table(policies, layer=0, top_k=TOP_K, num_experts=num_experts, device=device)


def inputs(device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    policy_ids = torch.arange(NUM_TOKENS) % 3
    tensors = {
        "scores": logits,
        "topk_ids": ids.int(),
        "topk_weights": weights,
        "policy_ids": policy_ids.int(),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def test_statistics_are_added_to() -> None:
    statistics = torch.full((6,), 100, dtype=torch.int64)
    refine(**inputs(), table=make_table(), router=Router(), statistics=statistics)
    assert statistics[:2].tolist() == [101, 100 + NUM_TOKENS]
    assert (statistics[2:4] > 100).all()


def with_changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    given = inputs()
    given[name] = change(given[name])
    return lambda: refine(**given, table=make_table(), router=Router())


def of_size(num_tokens: int, num_experts: int, top_k: int) -> Callable[[], object]:
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32)
    return lambda: refine(
        torch.zeros(num_tokens, num_experts),
        ids,
        ids.float(),
        ids[:, 0],
        make_table(num_experts=num_experts),
        Router(),
    )


BAD_CALLS = {
    "scores: expected float32, bfloat16 or float16": with_changed("scores", Tensor.double),
    "scores: expected 2 dimensions": with_changed("scores", lambda t: t[0]),
    r"topk_ids: expected shape \[6, 4\], got \[5, 4\]": with_changed("topk_ids", lambda t: t[:5]),
    "topk_ids: expected int32 or int64": with_changed("topk_ids", Tensor.short),
    "topk_weights: expected float32": with_changed("topk_weights", Tensor.double),
    r"policy_ids: expected shape \[6\]": with_changed("policy_ids", lambda t: t[:3]),
    "policy_ids: expected elements of 32 bits": with_changed("policy_ids", Tensor.long),
    "similarity: expected shape": lambda: refine(
        **inputs(), table=make_table(num_experts=17), router=Router()
    ),
    "num_groups: expected a divisor": lambda: refine(
        **inputs(), table=make_table(), router=Router(num_groups=3, top_groups=1)
    ),
    "top_groups: expected 1 to num_groups": lambda: refine(
        **inputs(), table=make_table(), router=Router(num_groups=4, top_groups=5)
    ),
    "statistics: expected shape": lambda: refine(
        **inputs(),
        table=make_table(),
        router=Router(),
        statistics=torch.zeros(4, dtype=torch.int64),
    ),
    f"top_k: expected 1 to {MAX_TOP_K}": of_size(NUM_TOKENS, 2 * MAX_TOP_K, MAX_TOP_K + 1),
    "top_k: expected at most the number of experts": of_size(NUM_TOKENS, 4, 5),
    f"scores: expected at most {MAX_ROWS} rows": of_size(MAX_ROWS + 1, NUM_EXPERTS, TOP_K),
    f"union: expected 1 to {MAX_EXPERTS} experts": of_size(NUM_TOKENS, MAX_EXPERTS + 1, TOP_K),
    r"bias: expected shape \[16\]": lambda: refine(
        **inputs(), table=make_table(), router=Router("sigmoid", bias=torch.zeros(17))
    ),
    r"gates: expected shape \[6, 16\]": lambda: refine(
        **inputs(), table=make_table(), router=Router(), gates=torch.zeros(6, 15)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_bad_argument_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_the_demand_of_the_most_rows_does_not_overflow() -> None:
    """All rows but one ask for one expert with all that they have."""
    policies: list[Policy] = [Budget.model_validate({"max_active": 1})]
    table = build_table(policies, layer=0, top_k=1, num_experts=NUM_EXPERTS)
    logits = torch.zeros(MAX_ROWS, NUM_EXPERTS)
    logits[:, 7] = 1.0
    logits[0, 3] = 2.0
    ids = logits.argmax(dim=1, keepdim=True)
    plan = torch.zeros(MAX_ROWS, dtype=torch.int32)
    _, _, union = refine(logits, ids, torch.ones(MAX_ROWS, 1), plan, table, Router())
    assert union.nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    ("header", "constant", "value"),
    [
        ("include/moe_routing/call.h", "kMaxRows", MAX_ROWS),
        ("include/moe_routing/call.h", "kMaxExperts", MAX_EXPERTS),
        ("include/moe_routing/call.h", "kMaxTopK", MAX_TOP_K),
        ("include/moe_routing/call.h", "kMaxGroups", MAX_GROUPS),
        ("include/moe_routing/call.h", "kPad", PAD),
        ("include/moe_routing/call.h", "kFree", FREE),
        ("cuda/route.cuh", "kOneBlockRows", ops.ONE_LAUNCH_ROWS),
        ("cuda/route.cuh", "kWorkspaceWords", ops.WORKSPACE_WORDS),
    ],
)
def test_python_and_the_kernels_agree(header: str, constant: str, value: int) -> None:
    assert f"constexpr int {constant} = {value};" in (building.CSRC / header).read_text()


def bind(union: Tensor | None = None, statistics: Tensor | None = None) -> BoundLayer:
    union = torch.empty(NUM_EXPERTS, dtype=torch.bool) if union is None else union
    return BoundLayer(make_table(), Router(), union, top_k=TOP_K, statistics=statistics)


BAD_IN_PLACE = {
    "topk_ids: expected adjacent elements": ("topk_ids", lambda t: t.T.contiguous().T),
    "topk_weights: expected adjacent elements": ("topk_weights", lambda t: t.T.contiguous().T),
    "topk_ids: expected rows that do not overlap": ("topk_ids", lambda t: t[:1].expand(6, -1)),
    "topk_weights: expected rows that do not": ("topk_weights", lambda t: t[:1].expand(6, -1)),
    r"topk_ids: expected shape \[6, 4\], got \[6, 3\]": ("topk_ids", lambda t: t[:, :3]),
    r"scores: expected shape \[6, 16\], got \[6, 15\]": ("scores", lambda t: t[:, :15]),
    "policy_ids: expected a contiguous tensor": ("policy_ids", lambda t: t.repeat(2)[::2]),
}


@pytest.mark.parametrize("message", BAD_IN_PLACE)
def test_what_cannot_be_routed_in_place_is_left_alone(message: str) -> None:
    name, change = BAD_IN_PLACE[message]
    given = inputs()
    given[name] = change(given[name])
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(ValueError, match=message):
        bind().reroute(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_only_parts_that_the_statistics_have_are_added_to() -> None:
    statistics = torch.zeros(2, 6, dtype=torch.int64)
    layer = bind(statistics=statistics)
    layer.reroute(**inputs(), part=1)
    layer.reroute(**inputs(), part=NOT_COUNTED)
    assert statistics[:, 0].tolist() == [0, 1]
    for other in (layer, bind()):
        with pytest.raises(ValueError, match="part: expected one that the statistics have"):
            other.reroute(**inputs(), part=2)
    assert statistics[:, 0].tolist() == [0, 1]


def test_the_union_must_be_of_truth_values() -> None:
    with pytest.raises(ValueError, match="union: expected elements of 8 bits"):
        bind(torch.empty(NUM_EXPERTS))


def test_a_bound_layer_keeps_its_tensors() -> None:
    """Nobody else has to hold them: what is allocated later does not take their place."""
    layer = bind()
    filler = [torch.full_like(make_table().words, 7) for _ in range(64)]
    filler += [torch.full((NUM_EXPERTS,), True) for _ in range(64)]
    given = inputs()
    layer.reroute(**given)
    ids, weights, _ = refine(**inputs(), table=make_table(), router=Router())
    assert torch.equal(given["topk_ids"], ids)
    assert torch.equal(given["topk_weights"], weights)
    assert all(tensor.all() for tensor in filler)


def test_a_bound_layer_follows_a_rewritten_table() -> None:
    """As a reload under captured graphs does it."""
    table, union = make_table(), torch.empty(NUM_EXPERTS, dtype=torch.bool)
    layer = BoundLayer(table, Router(), union, top_k=TOP_K)
    vanilla = torch.zeros_like(table.words)
    table.rewrite(replace(table, words=vanilla))
    given = inputs()
    layer.reroute(**given)
    assert torch.equal(given["topk_ids"], inputs()["topk_ids"])


def test_coefficients_come_and_go_with_a_rewritten_table() -> None:
    """A reload under captured graphs may bring an artifact with coefficients, or take it away."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.rand(2, NUM_EXPERTS, NUM_EXPERTS, generator=generator)
    sere = SERE.model_validate({"num_primary": 1, "threshold": -1.0})

    def table(coefficients: dict[str, Tensor]) -> PolicyTable:
        made = build_table(
            [sere, Vanilla()],
            layer=0,
            top_k=TOP_K,
            num_experts=NUM_EXPERTS,
            similarity={"a": matrices[0]},
            coefficients=coefficients,
            artifacts=["a", None],
        )
        return with_capacity(made, Capacity(policies=3, steps=3, matrices=3))

    given = inputs() | {"policy_ids": torch.zeros(NUM_TOKENS, dtype=torch.int32)}
    tables = [table({}), table({"a": matrices[1]})]
    expected = [refine(**given, table=made, router=Router())[1] for made in tables]
    assert not torch.equal(*expected)
    served = table({})
    layer = BoundLayer(served, Router(), torch.empty(NUM_EXPERTS, dtype=torch.bool), top_k=TOP_K)
    for which in (1, 0, 1):
        served.rewrite(tables[which])
        call = {name: tensor.clone() for name, tensor in given.items()}
        layer.reroute(**call)
        assert torch.equal(call["topk_weights"], expected[which])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_that_of_each_call(dtype: torch.dtype) -> None:
    """An update of the weights may replace it, or write into it."""
    router = Router("sigmoid", bias=torch.zeros(NUM_EXPERTS, dtype=dtype))
    table, union = make_table(), torch.empty(NUM_EXPERTS, dtype=torch.bool)
    layer = BoundLayer(table, router, union, top_k=TOP_K)
    for expert in (3, 5):
        given, bias = inputs(), torch.zeros(NUM_EXPERTS, dtype=dtype)
        given["topk_ids"][:, 0] = expert
        bias[expert] = 9.0
        policy_ids = torch.ones_like(given.pop("policy_ids"))
        layer.reroute(**given, policy_ids=policy_ids, bias=bias)
        assert (given["topk_ids"] == expert).any(dim=1).all()
        assert given["topk_ids"].eq(expert).nonzero()[:, 1].eq(0).all()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "router", "reason"),
    [
        (MAX_EXPERTS, MAX_TOP_K, Router(num_groups=32), ""),
        (MAX_EXPERTS + 1, 4, Router(), f"{MAX_EXPERTS + 1} experts are more than the"),
        (64, MAX_TOP_K + 1, Router(), f"{MAX_TOP_K + 1} experts per token are more"),
        (66, 4, Router(num_groups=33), "33 expert groups are more than the 32"),
    ],
)
def test_what_kernels_cannot_serve_is_known_beforehand(
    num_experts: int, top_k: int, router: Router, reason: str
) -> None:
    found = beyond_limits(router, num_experts, top_k)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_room_for_more_changes_nothing(device: str, seed: int) -> None:
    case = varied_case((12, 32, 4), seed)
    engaged = [
        policy.model_copy(update={"engage": Engagement(min_rows=1 + 3 * (i % 4))})
        for i, policy in enumerate(map(to_policy, case.specs))
    ]
    table = build_table(
        engaged,
        layer=0,
        top_k=case.top_k,
        num_experts=case.num_experts,
        similarity=case.artifacts,
        coefficients=case.coefficients,
        artifacts=[spec.get("artifact") for spec in case.specs],
        device=device,
    )
    num_matrices = len(case.artifacts) + len(case.coefficients)
    assert table.capacity == Capacity(policies=len(case.specs), steps=5, matrices=num_matrices)
    wide = with_capacity(
        table, Capacity(policies=len(case.specs) + 3, steps=9, matrices=num_matrices + 1)
    )
    arguments = [
        t.to(device)
        for t in (case.scores, case.topk_ids, case.topk_weights, policy_ids(case, torch.int32))
    ]
    expected = refine(*arguments, table, Router())
    for found, wanted in zip(refine(*arguments, wide, Router()), expected, strict=True):
        assert torch.equal(found, wanted)
    wide.rewrite(with_capacity(make_table(device, case.num_experts), wide.capacity))
    assert not any(map(torch.equal, refine(*arguments, wide, Router())[:1], expected))


def test_too_little_room_says_of_what() -> None:
    with pytest.raises(PolicyError, match="needs room for 3 policies, there is room for 2"):
        with_capacity(make_table(), Capacity(policies=2, steps=1, matrices=0))
