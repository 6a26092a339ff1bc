import pytest
from my_policies import Doubling

from sglang_moe_routing.testing import check_policy


@pytest.mark.parametrize("share", [0.0001, 0.05, 1.0])
def test_doubling_keeps_what_every_policy_promises(share: float) -> None:
    check_policy(Doubling(share=share))
