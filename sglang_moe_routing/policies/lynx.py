"""`lynx`: Lynx (arXiv 2411.08982), experts that the tokens of a batch vote for."""

from __future__ import annotations

from typing import Literal

from .budget import Filled
from .rule import Place, Rule
from .schedule import Count


class Lynx(Filled):
    """The batch loads the `max_active` experts that most of its tokens have in their top-k.

    A token keeps those of its own top-k that are loaded and takes no others; one that keeps none
    is left alone.
    """

    kind: Literal["lynx"] = "lynx"
    max_active: Count
    """Experts with most votes, per layer and step. What rows of other policies require comes on
    top."""

    def rule(self, place: Place) -> Rule:
        max_active = self.max_active.value(place.layer, place.live_rows)
        return Rule(k0=0, max_active=max_active, exponent=0, max_rank=place.top_k, **self.weights())
