"""Fields that kinds share: what becomes of the weight of the experts that a token loses."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..errors import shorten
from .base import Policy


class Compensated(Policy):
    """Base of kinds that take experts in the token's own order.

    Let W be the sum of a token's weights and `kept` the share of its top-k's gates that it still
    has. Its final weights are its gates, rescaled so that they sum to
    ``W * (kept + compensation * (1 - kept))``.
    """

    compensation: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much of the weight of lost experts goes to those that remain: 1 all, as the papers do;
    0 nothing. If absent, as the model weighs them: 1 where it normalises, raw gates where not."""


class Mapped(Compensated):
    """Base of kinds that can map weights by similarity as well.

    With ``mapped_share`` s a token's weights are ``(1 - s) * chosen + s * mapped``. `chosen` are
    the weights above. `mapped` are the router's own weights, each on its own expert where the token
    still has it, else on the most similar of the experts that it has (ties to the lowest id).
    Which experts run does not change.
    """

    mapped_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the weight that follows each lost expert to the most similar one that the token has;
    0 needs no similarity artifact."""
    similarity: str | None = None
    """Which artifact of the top-level `similarity` section; may be left out if there is one."""

    @model_validator(mode="after")
    def _similarity_is_used(self) -> Self:
        if self.similarity is not None and not self.uses_similarity:
            raise ValueError(
                f"similarity: {shorten(self.similarity)} has no effect without a mapped_share "
                "above 0"
            )
        return self

    @property
    def uses_similarity(self) -> bool:
        return self.mapped_share > 0

    def weights(self) -> dict[str, Any]:
        """The part of the rule that these fields are."""
        return {"mapped_share": self.mapped_share, "compensation": self.compensation}
