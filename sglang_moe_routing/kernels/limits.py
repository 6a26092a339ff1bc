"""What the compiled kernels hold."""

from __future__ import annotations

from ..policies import PolicyTable, Router

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_GROUPS = 32


def beyond_limits(router: Router, num_experts: int, top_k: int) -> str:
    """Why the kernels cannot serve a layer of this size; empty if they can."""
    limits = {
        "experts": (num_experts, MAX_EXPERTS),
        "experts per token": (top_k, MAX_TOP_K),
        "expert groups": (router.num_groups, MAX_GROUPS),
    }
    for what, (value, limit) in limits.items():
        if value > limit:
            return f"{value} {what} are more than the {limit} that the kernels hold"
    return ""


def written_in_torch(table: PolicyTable) -> str:
    """Which of its policies the kernels cannot run; empty if they run all."""
    kinds = sorted({policy.kind for policy in table.torch_policies.values()})
    return f"policies of kind {', '.join(kinds)} are written in torch" if kinds else ""
