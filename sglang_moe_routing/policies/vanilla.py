"""`vanilla`: the model's own routing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from .base import Engagement, Policy
from .rule import VANILLA, Place, Rule


class Vanilla(Policy):
    """The model's own routing, bit for bit, whoever shares the batch."""

    kind: Literal["vanilla"] = "vanilla"

    @model_validator(mode="after")
    def _is_never_engaged(self) -> Self:
        if self.engage != Engagement():
            raise ValueError("engage: has no effect, because vanilla never re-routes; leave it out")
        return self

    def rule(self, place: Place) -> Rule:
        return VANILLA
