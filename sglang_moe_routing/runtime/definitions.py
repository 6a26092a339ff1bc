"""Policy ids: one for each definition that the config has, or that a running request keeps."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..artifacts import SimilarityArtifact
from ..config import LoadedConfig, RoutingConfig
from ..policies import Policy, PolicyTable, Sizes, Vanilla, build_table

VANILLA_ID = 0
CACHE_PREFIX = "moe-routing:"
"""How every KV cache namespace of ours begins."""
_SHARED_KEY = f"{CACHE_PREFIX}shared|"


@dataclass(frozen=True)
class Definition:
    """What a name meant when a config was read.

    Attributes:
        policy: its rule.
        artifact: the similarity artifact that it uses, None if it uses none.
        cache_key: how its KV cache namespace begins, before the isolation group; empty for SGLang's
            own namespace, which all groups share. It holds a digest, so that equal policies share
            KV and a changed one never meets KV of its former self.
    """

    name: str
    policy: Policy
    artifact: SimilarityArtifact | None
    cache_key: str

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """Equal for definitions between which no request can tell a difference."""
        digest = self.artifact.sha256 if self.artifact else ""
        return self.name, self.policy.model_dump_json(), digest, self.cache_key


def define(
    loaded: LoadedConfig, artifacts: Mapping[str, SimilarityArtifact]
) -> tuple[Definition, ...]:
    """The definitions of a config, in the order of its names.

    Args:
        artifacts: by the config's names for them.
    """
    config = loaded.config
    definitions = []
    for name, policy in zip(config.names, config.definitions, strict=True):
        source = config.artifact_of(name)
        artifact = artifacts[source] if source else None
        key = _cache_key(config, policy, artifact)
        definitions.append(Definition(name, policy, artifact, key))
    return tuple(definitions)


def _cache_key(config: RoutingConfig, policy: Policy, artifact: SimilarityArtifact | None) -> str:
    if config.prefix_cache == "shared":
        return _SHARED_KEY if len(config.isolation.groups) > 1 else ""
    if isinstance(policy, Vanilla):
        return ""
    content = policy.model_dump_json() + (artifact.sha256 if artifact else "")
    return f"{CACHE_PREFIX}{hashlib.sha256(content.encode()).hexdigest()[:16]}|"


def make_table(definitions: Sequence[Definition], layer_id: int, sizes: Sizes) -> PolicyTable:
    """The policies of one layer, on the host; the place of a definition is its policy id."""
    artifacts = {d.artifact.sha256: d.artifact for d in definitions if d.artifact}
    return build_table(
        [d.policy for d in definitions],
        layer=layer_id,
        top_k=sizes.top_k,
        num_experts=sizes.num_experts,
        similarity={digest: a.matrices[layer_id] for digest, a in artifacts.items()},
        coefficients={
            digest: a.coefficients[layer_id] for digest, a in artifacts.items() if a.coefficients
        },
        artifacts=[d.artifact.sha256 if d.artifact else None for d in definitions],
    )


class Request(Protocol):
    """SGLang's `Req`, as far as it matters here."""

    def finished(self) -> bool: ...


class PolicyIds:
    """Gives every definition an id that stays its own as long as a request uses it.

    The place of a definition in `table` is its id; vanilla is always `VANILLA_ID`. Ids of former
    definitions are given anew by the second reload after, once their last request is gone: between
    making a table and adopting it, requests still come in under the definitions in force.
    """

    def __init__(self, definitions: Sequence[Definition]) -> None:
        self.table: list[Definition] = list(definitions)
        self.of_name = {d.name: i for i, d in enumerate(self.table)}
        self._users: list[weakref.WeakSet[Request]] = [weakref.WeakSet() for _ in self.table]

    def use(self, policy_id: int, request: Request) -> None:
        """Keep `policy_id` for `request` until that is garbage, and in no forward in flight."""
        if policy_id != VANILLA_ID:
            self._users[policy_id].add(request)

    def in_use(self) -> list[Definition]:
        """What new requests may ask for, and what queued and running ones keep.

        Not what finished ones had: SGLang holds the last batches until others come.
        """
        in_force = set(self.of_name.values())
        return [
            d
            for i, d in enumerate(self.table)
            if i in in_force or any(not request.finished() for request in self._users[i])
        ]

    def with_config(self, definitions: Sequence[Definition]) -> list[Definition]:
        """The table after a reload: what runs keeps its place, what is new fills the gaps."""
        in_force = set(self.of_name.values())
        wanted = {d.identity for d in definitions[VANILLA_ID + 1 :]}  # gaps look like vanilla
        table: list[Definition | None] = [
            d if i in in_force or self._users[i] or d.identity in wanted else None
            for i, d in enumerate(self.table)
        ]
        vanilla = table[VANILLA_ID] = definitions[VANILLA_ID]
        present = {d.identity for d in table if d is not None}
        for definition in definitions:
            if definition.identity not in present:
                place = table.index(None) if None in table else len(table)
                table[place : place + 1] = [definition]
        while table[-1] is None:
            table.pop()
        return [d or vanilla for d in table]

    def adopt(self, table: Sequence[Definition], definitions: Sequence[Definition]) -> None:
        """Put a table of `with_config` into force for requests that come from now on."""
        places = {d.identity: i for i, d in reversed(list(enumerate(table)))}
        self._users += [weakref.WeakSet() for _ in range(len(table) - len(self._users))]
        self.table[:] = table
        self.of_name = {d.name: places[d.identity] for d in definitions}
