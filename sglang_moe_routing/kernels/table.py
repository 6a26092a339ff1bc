"""The policy table as the kernels read it: twelve 32-bit words for each policy and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ..policies import OEA, SERE, Budget, Policy, PolicyTable, Router, TopK, Vanilla

MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_GROUPS = 32

_KINDS: dict[type[Policy], int] = {Vanilla: 0, TopK: 1, OEA: 2, SERE: 3, Budget: 4}
_INT32_WORDS = {
    "k0": 1,
    "num_primary": 1,
    "k_max": 3,
    "max_rank": 4,
    "artifact": 6,
    "max_active": 8,
    "exponent": 9,
}
_FLOAT32_WORDS = {"p": 2, "threshold": 5, "mapped_share": 10}
_START_WORD = 7
_NUM_WORDS = 12


@dataclass(frozen=True)
class KernelTable:
    """What every policy does on one layer, for every number of live rows.

    Kernels read these tensors at every call, so a reload only has to rewrite their contents, also
    where captured graphs hold their addresses.

    Attributes:
        policies: int32 ``[num_policies, num_steps, 12]``; the words are those of ``Policy`` in
            ``csrc/include/moe_routing/call.h``.
        similarity: float32 ``[num_artifacts, num_experts, num_experts]``.
    """

    policies: Tensor
    similarity: Tensor

    @property
    def room(self) -> Room:
        num_policies, num_steps, _ = self.policies.shape
        return Room(num_policies, num_steps, self.similarity.shape[0])

    def rewrite(self, other: KernelTable) -> None:
        """Take over the contents of a table with the same room."""
        self.policies.copy_(other.policies)
        self.similarity.copy_(other.similarity)


class Room(NamedTuple):
    """How much a table holds."""

    policies: int
    steps: int
    artifacts: int


def unsupported(table: PolicyTable, router: Router, num_experts: int, top_k: int) -> str:
    """Why the kernels cannot serve this layer; empty if they can."""
    foreign = [kind.__name__ for kind in table.kinds if kind not in _KINDS]
    if foreign:
        return f"policies of kind {', '.join(foreign)} exist in Python only"
    limits = {
        "experts": (num_experts, MAX_EXPERTS),
        "experts per token": (top_k, MAX_TOP_K),
        "expert groups": (router.num_groups, MAX_GROUPS),
    }
    for what, (value, limit) in limits.items():
        if value > limit:
            return f"{value} {what} are more than the {limit} that the kernels hold"
    return ""


def compile_table(table: PolicyTable) -> KernelTable:
    """Lay `table` out for the kernels, on the same device. See `unsupported` for its limits.

    Raises:
        KernelError: a number does not fit 32 bits.
    """
    kinds = torch.tensor([_KINDS[kind] for kind in table.kinds], dtype=torch.int32)
    words = torch.zeros(*table.kind.shape, _NUM_WORDS, dtype=torch.int32)
    words[..., 0] = kinds[table.kind.cpu()]
    words[:, 1:, _START_WORD] = _int32("starts", table.starts)
    for name, values in table.parameters.items():
        if name in _INT32_WORDS:
            words[..., _INT32_WORDS[name]] |= _int32(name, values)
        else:
            bits = values.cpu().float().view(torch.int32)
            words[..., _FLOAT32_WORDS[name]] = bits
    device = table.kind.device
    return KernelTable(
        policies=words.to(device),
        similarity=table.similarity.contiguous(),
    )


def _int32(name: str, values: Tensor) -> Tensor:
    """`values` on the CPU; one that wrapped would be another policy."""
    words = values.cpu().int()
    wrong = values.cpu()[words != values.cpu()]
    if len(wrong):
        raise KernelError(f"{name}: {int(wrong[0])} does not fit the kernels' 32-bit numbers")
    return words


def with_room(table: KernelTable, room: Room) -> KernelTable:
    """Pad `table`: further policies are vanilla, further steps are never reached.

    Raises:
        KernelError: the table needs more than `room`; the message says of what.
    """
    spare = Room(*(has - needed for has, needed in zip(room, table.room, strict=True)))
    for what, has, needed, left in zip(Room._fields, room, table.room, spare, strict=True):
        if left < 0:
            raise KernelError(f"needs room for {needed} {what}, there is room for {has}")
    never = table.policies[:, -1:].clone()
    never[..., _START_WORD] = torch.iinfo(torch.int32).max
    policies = torch.cat([table.policies, never.expand(-1, spare.steps, -1)], dim=1)
    policies = nn.functional.pad(policies, (0, 0, 0, 0, 0, spare.policies))
    policies[..., _START_WORD] = policies[:1, :, _START_WORD]  # the same for all policies
    similarity = nn.functional.pad(table.similarity, (0, 0, 0, 0, 0, spare.artifacts))
    return KernelTable(policies.contiguous(), similarity.contiguous())
