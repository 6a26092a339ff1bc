"""Live reload: a new version of the routing config comes into force in all processes or in none.

The HTTP process validates the file, then asks every scheduler to stage it. Each reads it itself,
holds it to its model and builds its tables; ranks compare what they read. Only if all agree are
they told to commit, which happens in their event loop, between two steps of the model.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.managers.io_struct import SetInternalStateReq

from .. import environment, runtime
from ..artifacts import SimilarityArtifact
from ..config import LoadedConfig, RoutingConfig, load_config
from ..errors import PolicyError, ReloadError, RoutingError
from ..policies import PolicyTable, Sizes, with_capacity
from ..runtime import Layer, Process, ServedModel, digests, metrics, used_artifacts
from ..runtime.definitions import Definition, define, make_table
from ..runtime.similarity import check_artifacts
from . import http_server
from .attach import warn_of_policies, warn_of_torch_policies

logger = logging.getLogger(__name__)

PHASE = "moe_routing_reload"
"""Key of SGLang's update request that makes it ours; its value is a `Phase`."""
_TOKEN = "moe_routing_token"  # noqa: S105  # a key, not a secret
_DIGEST = "moe_routing_digest"
ERROR = "reload_error"
"""Where a scheduler's internal state says why it did not stage."""


class Phase(IntEnum):
    """What a scheduler is asked to do."""

    STAGE = 1
    COMMIT = 2
    DISCARD = 3


@dataclass(frozen=True)
class Staged:
    """A config that fits this process's model and only has to be taken over."""

    loaded: LoadedConfig
    artifacts: Mapping[str, SimilarityArtifact]
    table: Sequence[Definition]
    layers: Sequence[tuple[Layer, PolicyTable]]


_lock = asyncio.Lock()


async def reload(manager: Any) -> LoadedConfig:
    """Read the config anew and put it into force. For the HTTP process.

    Args:
        manager: SGLang's `TokenizerManager`.

    Raises:
        RoutingError: it cannot be served; nothing has changed.
    """
    async with _lock:
        try:
            return await _reload(manager)
        except Exception as error:
            metrics.show_failed_reload()
            logger.error("routing config not reloaded: %s", error)
            raise


async def _reload(manager: Any) -> LoadedConfig:
    _refuse_distant_replicas(manager.server_args)
    state = runtime.current()
    loaded, artifacts = await asyncio.to_thread(_read, state)
    if not all(await _send(manager, Phase.STAGE, loaded)):
        await _send(manager, Phase.DISCARD, loaded)
        states = await http_server.scheduler_states(manager)
        raise ReloadError("\n".join(dict.fromkeys(s[ERROR] for s in states if s[ERROR])))
    await _send(manager, Phase.COMMIT, loaded)
    state.adopt(loaded, artifacts)
    metrics.show_config(loaded.sha256, loaded.config.choosable)
    logger.info("routing config reloaded: %s", ", ".join(loaded.config.names))
    return loaded


def _refuse_distant_replicas(server_args: Any) -> None:
    """Replicas share no process group through which those of other nodes could learn the token."""
    if server_args.nnodes > 1 and server_args.dp_size > 1:
        raise ReloadError(
            f"--dp-size {server_args.dp_size} with --nnodes {server_args.nnodes}: replicas of "
            "several nodes cannot reload together; restart them"
        )


def _read(state: Process) -> tuple[LoadedConfig, dict[str, SimilarityArtifact]]:
    loaded = load_config(state.loaded.path)
    _refuse_fixed(state.config, loaded)
    return loaded, used_artifacts(loaded)


async def _send(manager: Any, phase: Phase, loaded: LoadedConfig) -> list[bool]:
    token = int(os.environ[environment.RELOAD_TOKEN])
    request = {PHASE: int(phase), _TOKEN: token, _DIGEST: _number(loaded.sha256)}
    replies = await manager.set_internal_state(SetInternalStateReq(server_args=request))
    return list(replies)


def _number(sha256: str) -> int:
    """What fits into SGLang's update request, which carries numbers only."""
    return int(sha256[:15], 16)


def _refuse_fixed(config: RoutingConfig, loaded: LoadedConfig) -> None:
    """Raise `ReloadError` if the file changes what buffers, threads and graphs were made for."""
    new = loaded.config
    fixed = {
        "statistics": (config.statistics, new.statistics),
        "metrics.per_layer": (config.metrics.per_layer, new.metrics.per_layer),
        "isolation, its set of groups": (config.isolation.groups, new.isolation.groups),
    }
    changed = [f"{key}: {old!r} -> {now!r}" for key, (old, now) in fixed.items() if old != now]
    if changed:
        raise ReloadError(
            f"{loaded.path}: cannot change while the server runs: {'; '.join(changed)}; restart it"
        )


class Participant:
    """A scheduler's part in reloads."""

    def __init__(self) -> None:
        self.error = ""
        self.staged: Staged | None = None

    def is_ours(self, request: Mapping[str, int | float]) -> bool:
        """Whether an update request comes from our own HTTP process.

        SGLang's route for update requests may be open to clients; they do not know the token.
        """
        return PHASE in request and str(request.get(_TOKEN)) == os.environ.get(
            environment.RELOAD_TOKEN
        )

    def handle(self, request: Mapping[str, int | float]) -> bool:
        """Do what `request` asks; whether all ranks could."""
        phase, state = Phase(int(request[PHASE])), runtime.current()
        if phase is Phase.STAGE:
            self.error = self._stage(state, int(request[_DIGEST]))
            return not self.error
        staged, self.staged = self.staged, None
        if phase is Phase.COMMIT and staged is not None:
            _commit(state, staged)
        return True

    def _stage(self, state: Process, digest: int) -> str:
        """Stage on this rank, compare with the others; what is wrong, empty if nothing is."""
        mine: tuple[str, list[str]]
        try:
            staged = _stage(state, digest)
            mine = "", digests(staged.loaded, staged.artifacts)
        except Exception as error:  # noqa: BLE001  # whatever it is, this scheduler keeps serving
            staged = None
            known = isinstance(error, RoutingError)
            mine = (str(error) if known else f"{type(error).__name__}: {error}"), []
        for rank, (problem, theirs) in enumerate(get_tp_group().all_gather_object(mine)):
            if problem:
                return f"tensor-parallel rank {rank}: {problem}" if rank else problem
            if not mine[0] and theirs != mine[1]:
                return f"tensor-parallel rank {rank} has read another routing config or artifact"
        self.staged = staged
        return mine[0]


def _stage(state: Process, digest: int) -> Staged:
    loaded = load_config(state.loaded.path)
    if _number(loaded.sha256) != digest:
        raise ReloadError(f"{loaded.path} differs from what the HTTP process read; reload again")
    _refuse_fixed(state.config, loaded)
    artifacts = used_artifacts(loaded)
    model = state.model
    sizes = {layer.layer_id: Sizes(layer.top_k, layer.num_experts) for layer in model.layers}
    check_artifacts(loaded, artifacts, sizes, model.weights)
    warn_of_policies(loaded, artifacts, sizes)
    if any(layer.has_kernels for layer in model.layers):
        warn_of_torch_policies(loaded)
    table = state.ids.with_config(define(loaded, artifacts))
    layers = [_stage_layer(model, loaded, layer, table) for layer in model.layers]
    return Staged(loaded, artifacts, table, layers)


def _stage_layer(
    model: ServedModel, loaded: LoadedConfig, layer: Layer, definitions: Sequence[Definition]
) -> tuple[Layer, PolicyTable]:
    table = make_table(definitions, layer.layer_id, Sizes(layer.top_k, layer.num_experts))
    where = f"layer {layer.layer_id}"
    if model.has_graphs:
        if layer.table.torch_policies or table.torch_policies:
            raise ReloadError(
                f"{where}: captured graphs can neither take up nor give up a policy that is "
                "written in torch; restart the server"
            )
        try:
            table = with_capacity(table, layer.table.capacity)
        except PolicyError as error:
            raise ReloadError(
                f"{loaded.path}: {where}: {error} in the captured graphs, which hold what is "
                "in force as well. Change less at a time, or restart, with more room under "
                "'reload' if need be; room of former definitions frees itself with the next reload "
                "after their last request"
            ) from None
    return layer, table.to(layer.union.device)


def _commit(state: Process, staged: Staged) -> None:
    model = state.model
    is_cuda = model.layers[0].union.is_cuda
    if is_cuda:
        torch.cuda.synchronize()  # the step in flight ends under the old tables
    for layer, table in staged.layers:
        model.adopt_table(layer, table)
    if is_cuda:
        torch.cuda.synchronize()
    state.adopt(staged.loaded, staged.artifacts, staged.table)
