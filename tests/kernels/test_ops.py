"""The compiled re-routing as Python calls it: clear errors, room for reloads, sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moe_routing.errors import PolicyError
from sglang_moe_routing.kernels import (
    MAX_ROWS,
    beyond_limits,
    choose,
    ops,
    refine,
    refine_out,
)
from sglang_moe_routing.policies import (
    OEA,
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


def outputs(device: str) -> dict[str, Tensor | None]:
    return {
        "out_ids": torch.empty(NUM_TOKENS, TOP_K, dtype=torch.int32, device=device),
        "out_weights": torch.empty(NUM_TOKENS, TOP_K, device=device),
        "out_union": torch.empty(NUM_EXPERTS, dtype=torch.bool, device=device),
        "statistics": torch.zeros(6, dtype=torch.int64, device=device),
        "workspace": None,
    }


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
    "topk_ids: expected a top_k of 1 to 32": of_size(NUM_TOKENS, 64, 33),
    "topk_ids: expected a top_k of at most the number": of_size(NUM_TOKENS, 4, 5),
    "scores: expected at most 65535 rows": of_size(MAX_ROWS + 1, NUM_EXPERTS, TOP_K),
    "scores: expected 1 to 1024 experts": of_size(NUM_TOKENS, 1025, TOP_K),
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
        ("cuda/route.cuh", "kOneBlockRows", ops.ONE_LAUNCH_ROWS),
        ("cuda/route.cuh", "kWorkspaceWords", ops.WORKSPACE_WORDS),
    ],
)
def test_python_and_the_kernels_agree(header: str, constant: str, value: int) -> None:
    assert f"constexpr int {constant} = {value};" in (building.CSRC / header).read_text()


def test_outputs_are_checked_too() -> None:
    given, out = inputs(), outputs("cpu")
    out["out_weights"] = torch.empty(NUM_TOKENS, TOP_K, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out_weights: expected the element type of topk_weights"):
        refine_out(**given, table=make_table(), router=Router(), **out)  # type: ignore[arg-type]
    out = outputs("cpu") | {"out_ids": torch.empty(TOP_K, NUM_TOKENS, dtype=torch.int32).T}
    with pytest.raises(ValueError, match="out_ids: expected adjacent elements"):
        refine_out(**given, table=make_table(), router=Router(), **out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "router", "reason"),
    [
        (1024, 32, Router(num_groups=32), ""),
        (1025, 4, Router(), "1025 experts are more than the 1024"),
        (64, 33, Router(), "33 experts per token are more than the 32"),
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
