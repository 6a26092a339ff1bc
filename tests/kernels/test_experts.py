"""The compiled experts and products against float64, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sglang_moe_routing.cpu import compiled_experts as experts
from sglang_moe_routing.kernels import choose

native = choose("cpu")
if not native.is_native:
    pytest.skip(native.reason, allow_module_level=True)

INSTRUCTION_SETS = str(native.module.instruction_sets()).split()
SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 130, 257])
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Of the largest output: float32 sums, and three roundings to 8 bits."""


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native.module.use_instruction_set(request.param)
    yield request.param
    native.module.use_instruction_set(INSTRUCTION_SETS[0])


@dataclass
class Case:
    """One call."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor
    options: dict[str, Any]

    def run(self, rows: slice = slice(None)) -> Tensor:
        return experts.run_experts(
            self.x[rows], self.w13, self.w2, self.weights[rows], self.ids[rows], **self.options
        )


def random_case(
    seed: int,
    *,
    rows: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    activation: str = "silu",
    has_bias: bool = False,
    is_interleaved: bool = False,
    wide_ids: bool = True,
    slack: int = 0,
) -> Case:
    """Random weights; `slack` columns and experts lie unused, full of NaN, between those used."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def spread(matrix: Tensor) -> Tensor:
        *outer, columns = matrix.shape
        full = torch.full((*outer, columns + slack), torch.nan, dtype=matrix.dtype)
        full[..., :columns] = matrix
        return full[..., :columns]

    weights = torch.rand(rows, top_k, generator=generator)
    weights[weights < 0.1] = 0
    ids = torch.randint(-1, num_experts, (rows, top_k), generator=generator)
    options: dict[str, Any] = {"activation": activation}
    if activation == "clamped_swiglu":
        options |= {"alpha": 1.702, "limit": 2.0}
    if has_bias:
        options["w13_bias"] = random(num_experts, 2 * intermediate)
        options["w2_bias"] = random(num_experts, hidden).to(dtype)
    if is_interleaved:
        options["is_interleaved"] = True
    return Case(
        x=spread(random(rows, hidden).to(dtype)),
        w13=spread((random(num_experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype)),
        w2=spread((random(num_experts, hidden, intermediate) / intermediate**0.5).to(dtype)),
        weights=weights,
        ids=ids if wide_ids else ids.int(),
        options=options,
    )


def expected(case: Case) -> Tensor:
    """The sum over slots in float64, one slot at a time."""
    out = torch.zeros(case.x.shape, dtype=torch.float64)
    for row, (weights, ids) in enumerate(
        zip(case.weights.tolist(), case.ids.tolist(), strict=True)
    ):
        for weight, expert in zip(weights, ids, strict=True):
            if expert >= 0 and weight != 0:
                out[row] += weight * one_expert(case, row, expert)
    return out


def one_expert(case: Case, row: int, expert: int) -> Tensor:
    options = case.options
    y = case.w13[expert].double() @ case.x[row].double()
    if "w13_bias" in options:
        y = y + options["w13_bias"][expert].double()
    gate, up = (y[::2], y[1::2]) if options.get("is_interleaved") else y.chunk(2)
    if options["activation"] == "silu":
        activated = functional.silu(gate) * up
    elif options["activation"] == "gelu_tanh":
        activated = functional.gelu(gate, approximate="tanh") * up
    else:
        gate = gate.clamp(max=options["limit"])
        up = up.clamp(-options["limit"], options["limit"])
        activated = gate * torch.sigmoid(options["alpha"] * gate) * (up + 1)
    z = case.w2[expert].double() @ activated
    return z + options["w2_bias"][expert].double() if "w2_bias" in options else z


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
        assert error <= TOLERANCE[found.dtype]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_experts_equal_the_sum_over_slots_and_rows_do_not_depend_on_each_other(
    name: str, data: st.DataObject
) -> None:
    native.module.use_instruction_set(name)
    case = random_case(
        data.draw(st.integers(0, 1 << 30)),
        rows=data.draw(st.sampled_from([0, 1, 2, 5, 16, 17, 33, 70])),
        num_experts=data.draw(st.sampled_from([1, 3, 8])),
        top_k=data.draw(st.integers(1, 8)),
        hidden=data.draw(SIZES),
        intermediate=data.draw(SIZES),
        dtype=data.draw(st.sampled_from(experts.DTYPES)),
        activation=data.draw(st.sampled_from(["silu", "gelu_tanh", "clamped_swiglu"])),
        has_bias=data.draw(st.booleans()),
        is_interleaved=data.draw(st.booleans()),
        wide_ids=data.draw(st.booleans()),
        slack=data.draw(st.sampled_from([0, 3])),
    )
    together = case.run()
    assert_near(together, expected(case))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in range(min(4, case.x.shape[0])):
            assert torch.equal(case.run(slice(row, row + 1))[0], together[row])
        some = case.run(slice(1, None, 3))
        assert torch.equal(some, together[1::3])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("dtype", experts.DTYPES)
def test_rows_do_not_depend_on_each_other_at_real_widths(
    instruction_set: str, dtype: torch.dtype, rows: int
) -> None:
    """Wide enough for several threads and several tasks each."""
    case = random_case(
        rows, rows=rows, num_experts=8, top_k=4, hidden=512, intermediate=192, dtype=dtype
    )
    together = case.run()
    assert_near(together[:16], expected(Case(**{**vars(case), **first_rows(case, 16)})))
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(case.run(slice(row, row + 1))[0], together[row])


def first_rows(case: Case, count: int) -> dict[str, Tensor]:
    return {name: getattr(case, name)[:count] for name in ("x", "weights", "ids")}


@pytest.mark.parametrize("num_experts", [512, 2048])
def test_many_experts(instruction_set: str, num_experts: int) -> None:
    case = random_case(
        0, rows=40, num_experts=num_experts, top_k=16, hidden=32, intermediate=16,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert_near(case.run(), expected(case))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", experts.DTYPES)
def test_bad_numbers_stay_in_their_row(
    instruction_set: str, dtype: torch.dtype, value: float
) -> None:
    sizes = {"num_experts": 4, "top_k": 2, "hidden": 40, "intermediate": 24, "dtype": dtype}
    clean = random_case(3, rows=20, **sizes)  # type: ignore[arg-type]
    clean.weights.fill_(0.5)
    clean.ids.clamp_min_(0)
    bad = Case(**{**vars(clean), "x": clean.x.clone()})
    bad.x[7, 5] = value
    found, before = bad.run(), clean.run()
    others = torch.arange(20) != 7
    assert torch.equal(found[others], before[others])
    assert torch.equal(found[7].isfinite(), expected(bad)[7].isfinite())


def test_slots_of_weight_0_and_inactive_experts_are_not_read(instruction_set: str) -> None:
    case = random_case(
        1, rows=9, num_experts=5, top_k=3, hidden=64, intermediate=32, dtype=torch.bfloat16
    )
    case.ids[case.ids == 4] = 0
    case.ids[3], case.weights[3] = torch.tensor([4, 1, 2]), torch.tensor([0.0, 0.5, 0.5])
    case.w13[4], case.w2[4] = torch.nan, torch.nan
    assert case.run().isfinite().all()
    assert_near(case.run(), expected(case))


def test_a_row_without_experts_is_zero(instruction_set: str) -> None:
    case = random_case(
        2, rows=3, num_experts=2, top_k=2, hidden=33, intermediate=8, dtype=torch.float32
    )
    case.ids.fill_(-1)
    assert not case.run().any()


PROTECTED = """
import ctypes, mmap, sys, torch
from sglang_moe_routing.cpu import compiled_experts as experts
from sglang_moe_routing.kernels import choose

H, I, N = 64, 64, 6
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def guarded(rows, columns):
    bytes_each = rows * columns * 2
    assert bytes_each % page == 0
    memory = mmap.mmap(-1, N * bytes_each + page)
    whole = torch.frombuffer(memory, dtype=torch.bfloat16)
    weights = whole[: N * rows * columns].view(N, rows, columns)
    weights.normal_(0, 0.1)
    for expert in (1, 4, 5, N):  # N: what lies behind
        size = bytes_each if expert < N else page
        address = whole.data_ptr() + expert * bytes_each
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0
    return weights

choose("cpu").module.use_instruction_set(sys.argv[1])
w13, w2 = guarded(2 * I, H), guarded(H, I)
x = torch.randn(8, H).bfloat16()
ids = torch.tensor([[0, 2, 3, -1]]).repeat(8, 1)
ids[2, 1], ids[5, 3] = 4, 1
weights = torch.rand(8, 4) + 0.1
weights[2, 1] = weights[5, 3] = 0
experts.run_experts(x, w13, w2, weights, ids)
print("untouched", flush=True)
ids[0, 0] = 1
experts.run_experts(x, w13, w2, weights, ids)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_memory_of_inactive_experts_is_never_touched(name: str) -> None:
    """Their pages may not be read; the second call, which needs one, must die of it."""
    assert 64 * 64 * 2 % mmap.PAGESIZE == 0
    assert hasattr(ctypes.CDLL(None), "mprotect")
    done = subprocess.run(
        [sys.executable, "-c", PROTECTED, name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": ""},
        check=False,
    )
    assert done.stdout == "untouched\n", done.stderr
    assert done.returncode == -11


@pytest.mark.parametrize("wrong", [6, -2, 1 << 40])
def test_an_id_that_is_no_expert_is_named(instruction_set: str, wrong: int) -> None:
    case = random_case(
        4, rows=4, num_experts=6, top_k=2, hidden=16, intermediate=8, dtype=torch.float32
    )
    case.ids[2, 1] = wrong
    with pytest.raises(ValueError, match=rf"topk_ids\[2, 1\] = {wrong}: expected -1 or an expert"):
        case.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 16).half()}, "hidden_states: expected float32 or bfloat16"),
        ({"x": torch.zeros(4, 17)}, "w13: expected shape"),
        ({"x": torch.zeros(16, 4).T}, "hidden_states: expected adjacent elements"),
        ({"w2": torch.zeros(6, 16, 8).bfloat16()}, "w2: expected the element type"),
        ({"w2": torch.zeros(6, 8, 16).mT}, "w2: expected adjacent columns"),
        ({"w13": torch.zeros(6, 16, 15)}, "w13: expected shape"),
        ({"weights": torch.zeros(4, 3)}, "topk_weights: expected shape"),
        ({"ids": torch.zeros(4, 2).float()}, "topk_ids: expected int32 or int64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    case = random_case(
        4, rows=4, num_experts=6, top_k=2, hidden=16, intermediate=8, dtype=torch.float32
    )
    with pytest.raises(ValueError, match=message):
        Case(**{**vars(case), **change}).run()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_products_equal_float64_and_rows_do_not_depend_on_each_other(
    name: str, data: st.DataObject
) -> None:
    native.module.use_instruction_set(name)
    rows = data.draw(st.sampled_from([0, 1, 3, 16, 17, 40, 130]))
    columns, size = data.draw(SIZES), data.draw(SIZES)
    dtype = data.draw(st.sampled_from(experts.DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    x = torch.randn(rows, size + 5, generator=generator).to(dtype)[:, :size]
    weight = (torch.randn(columns, size, generator=generator) / size**0.5).to(dtype)
    together = experts.linear(x, weight)
    assert_near(together, x.double() @ weight.double().T)
    for row in range(min(rows, 3)):
        assert torch.equal(experts.linear(x[row : row + 1], weight)[0], together[row])


def test_the_stream_reads_every_byte() -> None:
    memory = torch.zeros((3 << 20) + 13, dtype=torch.uint8)
    checksum = experts.stream_read(memory)
    for place in (0, 70_000, 2_500_001, memory.numel() - 1):
        memory[place] = 1
        assert experts.stream_read(memory) != checksum
        memory[place] = 0
