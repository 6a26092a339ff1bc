"""What a policy is: validated, frozen data that gives a `Rule` for a layer and its live rows."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import ValidationError, model_validator
from pydantic.functional_validators import BeforeValidator

from ..errors import PolicyError, shorten
from .rule import VANILLA, Place, Rule, StrictModel
from .schedule import MAX_ROWS, Layers, PositiveCount, Schedule, format_layers

PAD = -1
"""Policy id of a padded row."""

FREE = -1
"""Id of a free slot where the engine's MoE runner ignores such slots."""


class FreeSlots(IntEnum):
    """Which id stands in a slot that holds no expert; its weight is 0.

    No other slot of a row names an expert that stands in one of its slots already, and a free slot
    is never counted and activates nothing.
    """

    IGNORED = 0
    """`FREE`, which the engine's MoE runner skips."""
    REPEAT_FIRST = 1
    """The expert of the row's first slot, for runners that take repeats; a padded row, which has no
    expert, names one that is active anyway."""


def _refuse_no_limit(value: object) -> object:
    if isinstance(value, int) and value > MAX_ROWS:
        raise ValueError(
            f"{shorten(value)} is above {MAX_ROWS}, the most that can be said; "
            "where there is no limit, leave max_rows out"
        )
    return value


class Engagement(StrictModel):
    """When a policy is in force. Outside this range its rows are vanilla."""

    phase: Literal["decode", "all"] = "decode"
    """'decode' leaves prefill exact; 'all' re-routes prompt tokens as well."""
    min_rows: PositiveCount = 1
    """Fewest live rows (tokens in the MoE call) at which the policy acts."""
    max_rows: Annotated[PositiveCount | None, BeforeValidator(_refuse_no_limit)] = None
    """Most live rows at which the policy acts; no limit if absent."""
    layers: Layers | None = None
    """Layers on which the policy acts; all MoE layers if absent."""

    @model_validator(mode="after")
    def _rows_in_order(self) -> Self:
        if self.max_rows is not None and self.max_rows < self.min_rows:
            raise ValueError(f"max_rows ({self.max_rows}) is below min_rows ({self.min_rows})")
        return self

    def covers(self, layer: int, num_rows: int) -> bool:
        """Whether the policy acts on `layer` when `num_rows` rows are live."""
        in_rows = self.min_rows <= num_rows <= (self.max_rows or num_rows)
        return in_rows and (self.layers is None or layer in self.layers)

    @property
    def last_row(self) -> int:
        """Most live rows at which the policy acts."""
        return MAX_ROWS if self.max_rows is None else self.max_rows


class Policy(StrictModel):
    """Which experts a token uses, by a name in the config. Subclass it to add a kind.

    A subclass declares ``kind: Literal["name"] = "name"`` and its parameters as fields (of type
    `Count` or `Similarity` where they may follow the layer or the live rows), and says in `rule`
    what they amount to. The compiled kernels apply any rule: a kind costs nothing but its file.
    """

    kind: str
    """Which rule this is."""
    engage: Engagement = Engagement()
    """When the policy is in force."""

    @model_validator(mode="after")
    def _schedules_are_engaged(self) -> Self:
        problems = [problem for name, s in self.schedules() for problem in _unused(name, s, self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def rule(self, place: Place) -> Rule:
        """The numbers in force at `place`. Asked while tables are built, never in a step."""
        raise NotImplementedError(f"{type(self).__name__} defines no rule(self, place)")

    def rule_at(self, place: Place) -> Rule:
        """What `rule` says, held to being one. Raises `PolicyError`."""
        where = f"kind: {self.kind} gives no rule at {place}"
        try:
            rule = self.rule(place)
        except ValidationError as error:
            wrong = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors() if e["loc"])
            raise PolicyError(f"{where}: {wrong or error}") from error
        except Exception as error:
            raise PolicyError(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(rule, Rule):
            raise PolicyError(f"{where} but {shorten(rule)}")
        return rule

    def schedules(self) -> Iterator[tuple[str, Schedule[int] | Schedule[float]]]:
        """Fields that may depend on the layer or on the live rows, by name."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Schedule):
                yield name, value

    def steps(self) -> set[int]:
        """Numbers of live rows from which on `rule` may say something else than below.

        Those of `schedules`; a kind whose rule follows the live rows by a formula adds its own.
        """
        return {start for _, schedule in self.schedules() for start in schedule.rows}

    def starts(self) -> set[int]:
        """Numbers of live rows from which the policy behaves differently: `steps` and `engage`.

        Raises `PolicyError` if `steps` says what is none.
        """
        found = {self.engage.min_rows, *self._steps()}
        if self.engage.max_rows is not None:
            found.add(self.engage.max_rows + 1)
        return found

    def _steps(self) -> set[int]:
        """What `steps` says, held to being numbers of rows."""
        where = f"kind: {self.kind}: `steps`"
        try:
            steps = set(self.steps())
        except Exception as error:
            raise PolicyError(f"{where}: {type(error).__name__}: {error}") from error
        for step in steps:
            if type(step) is not int or not 1 <= step <= MAX_ROWS:
                raise PolicyError(f"{where} has {shorten(step)}, expected 1 to {MAX_ROWS} rows")
        return steps

    def in_force(self, place: Place) -> Rule:
        """The rule at `place`: vanilla's where the policy does not act. Raises `PolicyError`."""
        acts = self.engage.covers(place.layer, place.live_rows)
        return self.rule_at(place) if acts else VANILLA

    def is_vanilla(self, place: Place) -> bool:
        """Whether rows stay bit for bit as the model routes them."""
        return self.in_force(place).is_vanilla(place.top_k)

    @property
    def uses_similarity(self) -> bool:
        """Whether rules use a similarity artifact: the policy then names one in `similarity`."""
        return False

    def check(self, top_k: int, num_experts: int) -> list[str]:
        """What is wrong with this policy for a router of this size; empty if nothing is."""
        return []

    def doubts(self, top_k: int, num_experts: int) -> list[str]:
        """What can be served with a router of this size but is hardly meant; empty if nothing."""
        return []


def exceeds_top_k(name: str, value: int, top_k: int) -> list[str]:
    """The problem of a count of a token's own experts that is more than there are."""
    return [f"{name}: {value} exceeds the model's top_k of {top_k}"] if value > top_k else []


def _unused(name: str, schedule: Schedule[int] | Schedule[float], policy: Policy) -> Iterator[str]:
    """What `schedule` says about layers and numbers of rows at which `policy` never acts."""
    engage = policy.engage
    for layers in schedule.layers:
        if engage.layers is not None and not set(layers) & set(engage.layers):
            named = format_layers(layers)
            yield f"{name}.layers.{named}: has no effect, because engage.layers leaves it out"
    for start, end in pairwise([*sorted(schedule.rows), MAX_ROWS + 1]):
        if start > engage.last_row or end <= engage.min_rows:
            yield (
                f"{name}.rows.{start}: has no effect, because engage says {engage.min_rows} to "
                f"{engage.last_row} rows"
            )
