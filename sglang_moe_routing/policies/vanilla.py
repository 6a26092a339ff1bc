"""`vanilla`: the model's own routing."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .base import Parameters, Policy, Rows


class Vanilla(Policy):
    """The model's own routing, bit for bit, whoever shares the batch."""

    kind: Literal["vanilla"] = "vanilla"

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        return rows.chosen

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        return rows.topk_ids, rows.topk_weights
