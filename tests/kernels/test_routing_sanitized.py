"""The CPU re-routing under AddressSanitizer and UBSan, every buffer of its exact size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_moe_routing.kernels import native
from tests.cases import varied_case
from tests.kernels import building
from tests.kernels.conftest import INSTRUCTION_SETS, Simulated, call_of
from tests.kernels.driver import Driver, build_driver
from tests.kernels.test_routing import assert_as_oracle

REASON = building.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SHAPES = [
    (0, 8, 2),
    (1, 1, 1),
    (16, 7, 3),
    (24, 60, 4),
    (33, 72, 8),
    (16, 128, 8),
    (65, 160, 6),
    (9, 256, 8),
    (12, 512, 10),
]


@pytest.fixture(scope="module")
def program() -> Path:
    return build_driver("asan")


@pytest.fixture(params=INSTRUCTION_SETS)
def sanitized(request: pytest.FixtureRequest, program: Path) -> Iterator[Simulated]:
    chosen = native.choose("cpu")
    if chosen.module is None:
        pytest.skip(chosen.reason)
    if request.param not in str(chosen.module.instruction_sets()).split():
        pytest.skip(f"this processor lacks {request.param}")
    driver = Driver(program)
    yield Simulated(driver, request.param)
    driver.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_access_is_out_of_place(sanitized: Simulated, shape: tuple[int, int, int]) -> None:
    """The driver dies of a finding; and what it answers is the oracle's answer."""
    for seed in range(6):
        case = varied_case(shape, seed)
        assert_as_oracle(sanitized(call_of(case, seed=seed), out_gap=seed % 3), case)
