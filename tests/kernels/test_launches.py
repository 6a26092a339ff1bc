"""How many kernels a call launches: the budget of a decode step on a GPU."""

from __future__ import annotations

import pytest
import torch

from sglang_moe_routing.policies import TopK, Vanilla, build_table
from tests.kernels import building
from tests.kernels.conftest import plain_driver
from tests.kernels.driver import Driver

REASON = building.why_unavailable()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    ("num_rows", "num_launches"), [(0, 1), (1, 1), (16, 1), (17, 2), (200, 2), (1500, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_in_the_decode_range_and_two_beyond(
    num_rows: int, num_launches: int, dtype: torch.dtype
) -> None:
    """The number depends on the shape alone, whatever the rows follow."""
    policies = [Vanilla(), TopK.model_validate({"k0": 2})]
    table = build_table(policies, layer=0, top_k=4, num_experts=128)
    driver = Driver(plain_driver())
    try:
        for policy_id in (-1, 0, 1):
            policy_ids = torch.full((num_rows,), policy_id, dtype=torch.int32)
            scores = torch.randn(num_rows, 128).to(dtype)
            ids = torch.arange(4, dtype=torch.int32).expand(num_rows, 4).contiguous()
            weights = torch.full((num_rows, 4), 0.25)
            outcome = driver.run(scores, policy_ids, table, ids, weights)
            assert outcome.num_launches == num_launches
    finally:
        driver.close()
