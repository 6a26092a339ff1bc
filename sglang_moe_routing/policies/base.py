"""What a routing policy is: validated, frozen data plus two pure functions over tensors.

A policy decides in two passes over one MoE call (``shared`` by all rows of a batch):

1. `Policy.required`: the experts that each row insists on. Their union over all live rows, which
   `Policy.fill` may extend, is ``U``: it is loaded whatever happens next.
2. `Policy.reroute`: the experts and weights that each row ends up with, given ``U``.

Both run on every row with static shapes and no host synchronisation, so that they can be baked
into a CUDA graph; the caller discards rows of other policies, whose parameters may be 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic_core import CoreSchema
from torch import Tensor

from ..errors import shorten

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


Number = TypeVar("Number", int, float)

Parameters = Mapping[str, Tensor]
"""Per-row values of a policy's schedulable parameters, ``[num_tokens]`` each."""


class StrictModel(BaseModel):
    """Frozen data that refuses unknown keys and silent type coercion."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


MAX_ROWS = 65_535
"""Most rows of a call that the kernels take. A policy names no larger number of rows or experts,
so that all fit the kernels' tables."""

MOST_LAYERS = 10_000
"""More than any model has: a range is a set of ids, and a typing error must not fill the memory."""


def parse_layers(value: object) -> tuple[int, ...]:
    """Turn ``5``, ``"0-3"``, ``"0-3,7"`` or a list of layer ids into a sorted tuple of ids."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        parts = value
    elif isinstance(value, str):
        parts = value.split(",")
    else:
        parts = [value]
    layers: set[int] = set()
    for part in parts:
        first, dash, last = str(part).strip().partition("-")
        if isinstance(part, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{shorten(part)} is not a layer id or a range such as 0-3")
        span = range(int(first), int(last or first) + 1)
        if span.stop > MOST_LAYERS:
            raise ValueError(f"{shorten(part)}: layer ids end at {MOST_LAYERS - 1}")
        if not span:
            raise ValueError(f"{part!r} is an empty range of layers")
        layers.update(span)
    return tuple(sorted(layers))


_MOST_SPANS = 20


def runs(layers: Iterable[int]) -> list[range]:
    """Layer ids as runs of consecutive ones."""
    found: list[range] = []
    for layer in sorted(layers):
        if found and layer == found[-1].stop:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def format_layers(layers: Iterable[int]) -> str:
    """Layer ids for a message, such as ``0-3,7``; a long list is cut."""
    spans = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs(layers)]
    return ",".join([*spans[:_MOST_SPANS], *(["..."] if len(spans) > _MOST_SPANS else [])])


_LAYERS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\d+(-\d+)?(,\s*\d+(-\d+)?)*$"},
        {"type": "array", "items": {"type": ["integer", "string"]}},
    ]
}


class _LayersJson:
    @staticmethod
    def __get_pydantic_json_schema__(
        schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(_LAYERS_SCHEMA)


Layers = Annotated[tuple[int, ...], BeforeValidator(parse_layers), _LayersJson]
"""Layer ids, written as ``5``, ``"0-3,7"`` or a list."""


def _parse_schedule(value: object) -> object:
    return value if isinstance(value, Mapping | Schedule) else {"default": value}


def _parse_layer_values(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    parsed: dict[object, object] = {}
    keys: dict[int, object] = {}
    for key, item in value.items():
        layers = parse_layers(key)
        for layer in layers:
            if layer in keys:
                both = f"{_written(keys[layer])} and {_written(key)}"
                raise ValueError(f"layer {layer} is given twice, by {both}")
            keys[layer] = key
        parsed[layers] = item
    return parsed


def _written(layers: object) -> str:
    return format_layers(layers) if isinstance(layers, tuple) else shorten(layers)


PositiveCount = Annotated[int, Field(ge=1, le=MAX_ROWS)]
"""A positive number of rows or experts."""


class Schedule(StrictModel, Generic[Number]):
    """A number that may depend on the layer or on the number of live rows.

    The value of a layer named in `layers` wins, then the highest step of `rows` that the number
    of live rows reaches, then `default`.
    """

    default: Number
    rows: dict[PositiveCount, Number] = {}
    """Steps: from this many live rows on, this value."""
    layers: Annotated[
        dict[tuple[int, ...], Number],
        BeforeValidator(_parse_layer_values, json_schema_input_type=dict[str, Number]),
    ] = {}
    """Layer ids or ranges: on these layers, this value."""

    def value(self, layer: int, num_rows: int) -> Number:
        """The value on `layer` when `num_rows` rows are live."""
        for layers, value in self.layers.items():
            if layer in layers:
                return value
        reached = [start for start in self.rows if start <= num_rows]
        return self.rows[max(reached)] if reached else self.default

    def values(self) -> list[Number]:
        """Every value that this schedule can take."""
        values: list[Number] = [self.default]
        values.extend(self.rows.values())
        values.extend(self.layers.values())
        return values

    def values_from(self, num_rows: int) -> list[Number]:
        """Every value that this schedule can take at `num_rows` live rows or more."""
        reached = [start for start in self.rows if start <= num_rows]
        values: list[Number] = [self.rows[max(reached)] if reached else self.default]
        values.extend(value for start, value in self.rows.items() if start > num_rows)
        values.extend(self.layers.values())
        return values


class _ScheduleJson:
    """JSON schema of "a number or a schedule object"."""

    @staticmethod
    def __get_pydantic_json_schema__(
        schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        full = handler(schema)
        properties = handler.resolve_ref_schema(full)["properties"]
        number = {k: v for k, v in properties["default"].items() if k != "title"}
        properties["layers"]["additionalProperties"] = number
        return {"anyOf": [number, full]}


class CountSchedule(Schedule[PositiveCount]):
    """A positive integer that may depend on the layer or on the number of live rows."""


class SimilaritySchedule(Schedule[Annotated[float, Field(allow_inf_nan=False)]]):
    """A similarity that may depend on the layer or on the number of live rows."""


Count = Annotated[CountSchedule, BeforeValidator(_parse_schedule), _ScheduleJson]
"""A positive integer, or a `Schedule` of them."""

Similarity = Annotated[SimilaritySchedule, BeforeValidator(_parse_schedule), _ScheduleJson]
"""A similarity threshold, or a `Schedule` of them."""


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
    """A named rule that changes which experts a token uses. Subclass it to add a kind.

    A subclass declares ``kind: Literal["name"] = "name"``, its parameters as fields (of type
    `Count` or `Similarity` where they may follow the layer or the live rows), and overrides
    `parameters`, `required` and `reroute`.
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

    def schedules(self) -> Iterator[tuple[str, Schedule[int] | Schedule[float]]]:
        """Those of `parameters` that may depend on the layer or on the live rows, by name."""
        for name, value in self.parameters().items():
            if isinstance(value, Schedule):
                yield name, value

    @property
    def uses_similarity(self) -> bool:
        """Whether `Rows.similarity` is needed: the policy then names an artifact."""
        return False

    def parameters(self) -> Mapping[str, Schedule[int] | Schedule[float] | int | float]:
        """The numbers that `required` and `reroute` read, by name."""
        return {}

    def is_vanilla(self, layer: int, num_rows: int, top_k: int) -> bool:
        """Whether the rule provably changes nothing here, so that rows stay bit for bit."""
        return False

    def check(self, top_k: int, num_experts: int) -> list[str]:
        """What is wrong with this policy for a router of this size; empty if nothing is."""
        return []

    def doubts(self, top_k: int, num_experts: int) -> list[str]:
        """What can be served with a router of this size but is hardly meant; empty if nothing."""
        return []

    @classmethod
    def required(cls, rows: Rows, parameters: Parameters, selected: Tensor) -> Tensor:
        """Pass 1: bool ``[num_tokens, num_experts]``, the experts that each row insists on.

        Args:
            selected: bool ``[num_tokens]``, the live rows that follow this kind of policy.
                Entries of other rows are ignored by the caller.
        """
        raise NotImplementedError

    @classmethod
    def fill(cls, rows: Rows, parameters: Parameters, selected: Tensor, union: Tensor) -> Tensor:
        """Between the passes: bool ``[num_experts]``, `union` and what this kind adds to it.

        Args:
            selected: bool ``[num_tokens]``, the live rows that follow this kind of policy.
            union: bool ``[num_experts]``, every expert that some live row requires.
        """
        return union

    @classmethod
    def reroute(cls, rows: Rows, parameters: Parameters, union: Tensor) -> tuple[Tensor, Tensor]:
        """Pass 2: ``(topk_ids, topk_weights)``, ``[num_tokens, top_k]`` each.

        Ids lie in ``[0, num_experts)``. Slots of a row may name one expert: the caller merges them.

        Args:
            union: bool ``[num_experts]``, what is loaded whatever happens next.
        """
        raise NotImplementedError


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


@dataclass(frozen=True)
class Rows:
    """One MoE call as a policy sees it. All tensors live on one device; none may be modified.

    Attributes:
        rank: int64 ``[num_tokens, num_experts]``, place of an expert in the row's preference
            (0 is best): the router's own top-k first, then by falling score, ties to the lower
            expert id, NaN last.
        order: int64 ``[num_tokens, num_experts]``, inverse of `rank`: the expert at each place.
        chosen: bool ``[num_tokens, num_experts]``, the router's own top-k.
        gates: float32 ``[num_tokens, num_experts]``, the model's combine weight of each expert
            before normalisation; NaN counts as 0.
        topk_ids: int64 ``[num_tokens, top_k]``, the router's choice in the engine's column order.
        topk_weights: float32 ``[num_tokens, top_k]``, its weights.
        renormalize: whether the model normalises over the chosen experts.
        scale: factor on raw gates where `renormalize` is false.
        similarity: float32 ``[num_artifacts, num_experts, num_experts]`` of this layer.
    """

    rank: Tensor
    order: Tensor
    chosen: Tensor
    gates: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    renormalize: bool
    scale: float
    similarity: Tensor

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.rank.shape[1]

    def has_weight(self, chosen: Tensor) -> Tensor:
        """bool ``[num_tokens, 1]``: whether some gate of the `chosen` experts is above 0."""
        return (chosen & (self.gates > 0)).any(dim=1, keepdim=True)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the top-k slots with the `chosen` experts and the weights the model gives them.

        Args:
            chosen: bool ``[num_tokens, num_experts]``, at most `top_k` per row.

        Returns:
            ``(topk_ids, topk_weights)`` in preference order. Slots left over repeat the row's first
            expert at weight 0. Weights are renormalised to the sum of the incoming row where
            the model normalises, else raw gates times `scale`. A row whose chosen experts have no
            weight keeps the router's choice and its weights.
        """
        ranked = torch.where(chosen, self.rank, self.num_experts)
        places = ranked.sort(dim=1).values[:, : self.top_k]  # [num_tokens, top_k]
        filled = places < self.num_experts
        first = places[:, :1].clamp(max=self.num_experts - 1)
        places = torch.where(filled, places, first)
        ids = self.order.gather(1, places)
        gates = torch.where(filled, self.gates.gather(1, ids), 0.0)
        if self.renormalize:
            wanted = self.topk_weights.sum(dim=1, keepdim=True)
            weights = gates / gates.sum(dim=1, keepdim=True) * wanted
        else:
            weights = gates * self.scale
        has_weight = self.has_weight(chosen)
        ids = torch.where(has_weight, ids, self.topk_ids)
        return ids, torch.where(has_weight, weights, self.topk_weights)
