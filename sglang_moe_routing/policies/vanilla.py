"""`vanilla`: the model's own routing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from .base import Engagement, Parameters, Policy, Rows


class Vanilla(Policy):
    """The model's own routing, bit for bit, whoever shares the batch."""

    kind: Literal["vanilla"] = "vanilla"

    @model_validator(mode="after")
    def _is_never_engaged(self) -> Self:
        if self.engage != Engagement():
            raise ValueError("engage: has no effect, because vanilla never re-routes; leave it out")
        return self

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.chosen

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids, rows.topk_weights
