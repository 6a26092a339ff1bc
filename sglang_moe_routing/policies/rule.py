"""The one rule that all policies are presets of: who is required, what fills up the union, what a
row takes, and what weights it gets. Plain numbers; kernels and reference apply the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

UNLIMITED = 2**31 - 1
"""Larger than any count: where a number sets no limit."""


class StrictModel(BaseModel):
    """Frozen data that refuses unknown keys and silent type coercion."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Place:
    """Where a rule is in force: one layer, at one number of live rows.

    Attributes:
        layer: the model's layer number.
        live_rows: rows of the call that are not padding, under whatever policies.
        top_k: the model's routed experts per token.
        num_experts: routed experts of the layer.
    """

    layer: int
    live_rows: int
    top_k: int
    num_experts: int


UpTo1 = Annotated[float, Field(ge=0, le=1)]
Limit = Annotated[int, Field(ge=1, le=UNLIMITED)]


class Rule(StrictModel):
    """What a policy does to its rows in one MoE call. The default is the model's own routing.

    1. A row *requires* its first `k0` experts in rank order, or fewer where they hold a share `p`
       of its gate mass. All that live rows require is the union U.
    2. If `max_active` is given, that many experts join U: those that such rows demand most.
    3. A row *takes* its best experts inside U; or, with a `threshold`, keeps its slots and sends
       those whose expert is outside U to the nearest stand-in.
    4. *Weights* are the model's over what was taken; `compensation` and `mapped_share` say what
       becomes of the weight that was lost.

    A row whose own top-k lies in U and is not cut by `k_max` or `max_rank` stays as it is, bit for
    bit. So does a row that would take no expert with a gate above 0. Both speak of rows whose top-k
    names distinct experts.
    """

    k0: Annotated[int, Field(ge=0, le=UNLIMITED)] = UNLIMITED
    """Experts that a row requires; from top_k on (with a `p` of 1) the row is left alone."""
    p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the gate mass at which a row requires no further expert; 1: no limit."""
    max_active: Annotated[int, Field(ge=0, le=UNLIMITED)] = 0
    """How many of the most demanded experts join U; 0: the rows demand none. The largest of a call
    counts."""
    exponent: Literal[0, 1, 2] = 2
    """Demand of a row for an expert of its top-k: its normalised gate to this power. 0: a vote."""
    k_max: Limit = UNLIMITED
    """Most experts that a row takes; at most top_k, and not fewer than it requires."""
    max_rank: Limit = UNLIMITED
    """Ranks from here on are not taken."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Slots move to stand-ins; one below this similarity is not near enough, and the slot stays."""
    mapped_share: UpTo1 = 0.0
    """Share of the weight that follows each lost expert to the most similar one that was taken."""
    compensation: UpTo1 | None = None
    """How much of the lost weight goes to the experts that remain. Absent: as the model weighs
    them, which is 1 where it normalises. With a `threshold`: factor on the weight of moved slots;
    absent: the coefficients of the artifact if it has any, else 1."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.moves:
            idle = {"k_max": UNLIMITED, "max_rank": UNLIMITED, "mapped_share": 0.0}
            given = [name for name, nothing in idle.items() if getattr(self, name) != nothing]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: no effect beside a threshold, with which slots move"
                )
        return self

    @property
    def moves(self) -> bool:
        """Whether slots move to stand-ins; else the row takes experts in its own order."""
        return self.threshold is not None

    @property
    def uses_similarity(self) -> bool:
        return self.moves or self.mapped_share > 0

    def is_vanilla(self, top_k: int) -> bool:
        """Whether rows stay bit for bit as the model routes them."""
        return self.k0 >= top_k and self.p == 1.0


VANILLA = Rule()


def limit(value: int | None) -> int:
    """`value`, or no limit."""
    return UNLIMITED if value is None else value
