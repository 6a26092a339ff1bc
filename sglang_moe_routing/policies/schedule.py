"""Numbers that may depend on the layer or on the number of live rows, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic.functional_validators import BeforeValidator
from pydantic_core import CoreSchema

from ..errors import shorten
from .rule import StrictModel

Number = TypeVar("Number", int, float)

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


Layers = Annotated[tuple[int, ...], BeforeValidator(parse_layers), WithJsonSchema(_LAYERS_SCHEMA)]
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
        return self._at(num_rows)

    def _at(self, num_rows: int) -> Number:
        """The value on layers that `layers` does not name."""
        reached = [start for start in self.rows if start <= num_rows]
        return self.rows[max(reached)] if reached else self.default

    def values(self) -> list[Number]:
        """Every value that this schedule can take."""
        return self.values_from(0)

    def values_from(self, num_rows: int) -> list[Number]:
        """Every value that this schedule can take at `num_rows` live rows or more."""
        values: list[Number] = [self._at(num_rows)]
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
