"""The schema of a routing config file. Pure data: opens no file, touches no device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    WithJsonSchema,
    create_model,
    model_validator,
)

from ..errors import shorten
from ..policies import Policy, PolicyRegistry, Vanilla
from ..policies.rule import StrictModel

VANILLA = "vanilla"
DEFAULT_HEADER = "X-MoE-Routing-Policy"
HEADER_PATTERN = (
    r"^([Xx]-([A-Za-z0-9]+-)*[Mm][Oo][Ee](-[A-Za-z0-9]+)*|[Xx]-[Ss][Mm][Gg]-[Rr]outing-[Kk]ey)$"
)
"""Nobody else owns a name with MoE in it; the other one is what routers group by."""
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
DEFAULT_GROUP = "default"
MAX_GROUPS = 8


class SimilaritySource(StrictModel):
    """A similarity artifact, and which models it may serve."""

    path: str
    """The file, relative to the config; ${VAR} is expanded."""
    allow_other_weights: bool = False
    """Serve models whose weights are not those that were calibrated: another fine-tune or a
    quantised copy of the same base. Layers and experts must match all the same."""


def _parse_source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[
    SimilaritySource,
    BeforeValidator(_parse_source, json_schema_input_type=str | SimilaritySource),
]

Choosable = Annotated[
    Annotated[Literal["all"], Tag("all")] | Annotated[list[Name], Tag("names")],
    Discriminator(
        lambda value: "names" if isinstance(value, list) else "all" if value == "all" else None,
        custom_error_type="choosable",
        custom_error_message="Input should be 'all' or a list of policies",
    ),
]


def _parse_headers(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_headers(names: list[str]) -> list[str]:
    for name in names:
        if len(name) > 64 or not re.fullmatch(HEADER_PATTERN, name):
            raise ValueError(
                f"{name!r:.80} may belong to HTTP, a proxy or SGLang; expected a name that starts "
                f"with X- and has MoE between hyphens, such as {DEFAULT_HEADER}, or "
                "X-SMG-Routing-Key"
            )
    if not names or len({name.lower() for name in names}) < len(names):
        raise ValueError(f"expected one or more names, each once, got {names}")
    return names


_HEADER_SCHEMA = {"type": "string", "pattern": HEADER_PATTERN, "maxLength": 64}
Headers = Annotated[
    list[str],
    BeforeValidator(_parse_headers),
    AfterValidator(_check_headers),
    WithJsonSchema(
        {"anyOf": [_HEADER_SCHEMA, {"type": "array", "items": _HEADER_SCHEMA, "minItems": 1}]}
    ),
]


class Isolation(StrictModel):
    """Groups of requests that do not influence each other's routing: a row votes for, and rides
    on, experts of its own group only. The file decides who is in which group, never the client:
    by API key where it is listed, else by policy, else the group is 'default'."""

    api_keys: dict[Sha256, Name] = {}
    """Group by API key: the key's SHA-256 in hex → group. The key is what the request carries as
    'Authorization: Bearer'."""
    other_keys: Literal["refuse", "allow"] = "refuse"
    """Once `api_keys` lists keys: whether a request with another key, or none, is refused with
    status 401, or is in the group of its policy."""
    policies: dict[Name, Name] = {}
    """Group by policy: policy → group."""

    @model_validator(mode="after")
    def _there_are_other_keys(self) -> Self:
        if "other_keys" in self.model_fields_set and not self.api_keys:
            raise ValueError("other_keys: has no effect without api_keys")
        return self

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """All groups; the place of a name is its group id. 'default' is 0."""
        named = {*self.api_keys.values(), *self.policies.values()} - {DEFAULT_GROUP}
        return DEFAULT_GROUP, *sorted(named)


class Metrics(StrictModel):
    """What is exported at /metrics where SGLang runs with --enable-metrics."""

    per_layer: bool = False
    """Label the counts of experts with the layer: six series for each MoE layer."""
    interval: Annotated[float, Field(ge=0.1, le=600)] = 5.0
    """Seconds between two readings of the counts on the device."""


class Reload(StrictModel):
    """Who may reload this file over HTTP, and what captured graphs keep room for. SIGHUP to the
    main process reloads always."""

    http: Literal["admin", "open"] = "admin"
    """'admin': POST /moe_routing/reload needs SGLang's --admin-api-key and is refused where there
    is none. 'open': everybody who reaches the server, with SGLang's --api-key if there is one;
    `isolation.api_keys` do not guard it."""
    policies: Annotated[int, Field(ge=1, le=1024)] = 32
    """Room for policies: those of the file, those of the file before it, and former definitions
    that running requests keep. At least what the file at start-up needs twice."""
    steps: Annotated[int, Field(ge=1, le=64)] = 1
    """Room for numbers of live rows at which some policy changes (engagement, schedules), counted
    over all policies, plus one. At least what the file at start-up needs twice."""
    artifacts: Annotated[int, Field(ge=0, le=64)] = 1
    """Room for further similarity artifacts beside those that are used at start-up; one with
    coefficients counts twice. At least as many again."""


class RoutingConfig(StrictModel):
    """A routing config: which policies there are, who may use them, and when they act."""

    version: Literal[1]
    """Version of this file format."""
    default: Name = VANILLA
    """Policy of a request that names none."""
    header: Annotated[Headers, Field(json_schema_extra={"default": DEFAULT_HEADER})] = [
        DEFAULT_HEADER
    ]
    """HTTP header with which a client picks a policy, or a list of such headers. Names start with
    X- and have MoE between hyphens; X-SMG-Routing-Key may be used too. Responses carry the
    first."""
    clients_may_choose: Choosable = "all"
    """Policies that clients may pick: 'all', or a list of names. The default is always allowed."""
    prefix_cache: Literal["isolated", "shared"] = "isolated"
    """'isolated': KV made under a policy is reused under the same policy only.
    'shared': one cache for all requests of an isolation group; vanilla requests may then read KV
    that a lossy policy wrote."""
    torch_policies: Literal["refuse", "allow"] = "refuse"
    """Whether policies may be listed that are written in torch, by other packages, instead of
    giving a rule. While one is, rows of every policy are computed in torch, many times slower than
    by the compiled kernels."""
    statistics: bool = True
    """Count active experts on the device, read out at /v1/moe_routing/statistics."""
    metrics: Metrics = Metrics()
    """What is exported for Prometheus."""
    reload: Reload = Reload()
    """Who may reload this file, and how much room a reload has."""
    isolation: Isolation = Isolation()
    """Groups of requests that do not influence each other's routing."""
    similarity: dict[Name, Source] = {}
    """Similarity artifacts by name. Paths are relative to this file; ${VAR} is expanded."""
    policies: dict[Name, SerializeAsAny[Policy]] = {}
    """Policies by name. 'vanilla' always exists and need not be listed."""

    @model_validator(mode="after")
    def _references_exist(self) -> Self:
        if not isinstance(self.policies.get(VANILLA, Vanilla()), Vanilla):
            raise ValueError(f"policies.{VANILLA}: the name 'vanilla' is reserved for the kind")
        if self.default not in self.names:
            raise ValueError(f"default: {self.default!r} is not a policy; {self._known()}")
        if self.clients_may_choose != "all":
            for name in self.clients_may_choose:
                if name not in self.names:
                    raise ValueError(
                        f"clients_may_choose: {name!r} is not a policy; {self._known()}"
                    )
        for name in self.isolation.policies:
            if name not in self.names:
                raise ValueError(f"isolation.policies: {name!r} is not a policy; {self._known()}")
        if len(self.isolation.groups) > MAX_GROUPS:
            raise ValueError(
                f"isolation: {len(self.isolation.groups)} groups with 'default', at most "
                f"{MAX_GROUPS}: every group costs one kernel launch in every MoE layer"
            )
        for name in self.policies:
            self.artifact_of(name)
        return self

    def _known(self) -> str:
        return f"known: {', '.join(self.names)}"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Policy names; the place of a name is its policy id. 'vanilla' is 0."""
        return (VANILLA, *(name for name in self.policies if name != VANILLA))

    @cached_property
    def definitions(self) -> tuple[Policy, ...]:
        """Policies in the order of `names`."""
        return tuple(self.policies.get(name, Vanilla()) for name in self.names)

    @cached_property
    def choosable(self) -> tuple[str, ...]:
        """Names that a client may ask for."""
        if self.clients_may_choose == "all":
            return self.names
        allowed = {self.default, *self.clients_may_choose}
        return tuple(name for name in self.names if name in allowed)

    def artifact_of(self, name: str) -> str | None:
        """Name of the similarity artifact that policy `name` uses, None if it uses none.

        Raises:
            ValueError: the artifact is unknown, or not named although there are several.
        """
        policy = self.definitions[self.names.index(name)]
        if not policy.uses_similarity:
            return None
        known = ", ".join(self.similarity) or "none"
        artifact = getattr(policy, "similarity", None)
        where = f"policies.{name}.similarity"
        if artifact is None and len(self.similarity) == 1:
            return next(iter(self.similarity))
        if artifact is None:
            raise ValueError(f"{where}: name one of the similarity artifacts; known: {known}")
        if artifact not in self.similarity:
            raise ValueError(
                f"{where}: {shorten(artifact)} is not in the top-level 'similarity' section; "
                f"known: {known}"
            )
        return str(artifact)


def model_for(registry: PolicyRegistry) -> type[RoutingConfig]:
    """`RoutingConfig` whose `policies` are exactly the kinds of `registry`."""
    classes = registry.classes()

    def kind_of(value: Any) -> Any:
        return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)

    members = tuple(Annotated[c, Tag(c.model_fields["kind"].default)] for c in classes)
    any_policy: Any = Annotated[Union[members], Discriminator(kind_of)]  # noqa: UP007
    field = RoutingConfig.model_fields["policies"]
    return create_model(
        "RoutingConfig",
        __base__=RoutingConfig,
        __doc__=RoutingConfig.__doc__,
        policies=(
            dict[Name, any_policy],
            Field(default={}, description=field.description),
        ),
    )


def json_schema(registry: PolicyRegistry) -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    schema = model_for(registry).model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "sglang-moe-routing config"
    return schema
