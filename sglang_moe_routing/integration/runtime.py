"""What one process knows about routing: the config, the layers, and the batch being run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..artifacts import SimilarityArtifact
from ..config import LoadedConfig
from ..errors import EngineError
from ..kernels import MAX_ROWS, KernelTable, refine_out, workspace
from ..policies import PAD, PolicyTable, Router, Vanilla, reroute
from ..similarity import load_similarities
from .recorder import Recorder
from .statistics import Statistics

VANILLA_ID = 0

LAYER = "_sglang_moe_routing_layer"
"""Attribute of a `TopKConfig` that opts its layer in; drafts and foreign routers lack it."""


@dataclass(frozen=True)
class Layer:
    """One routed MoE layer.

    Attributes:
        layer_id: the model's layer number.
        index: place among the MoE layers of this process.
        num_experts: routed experts, shared and redundant ones not counted.
        top_k: routed experts per token.
        kernel_table: `table` for the compiled kernels; None where the torch reference serves.
        union: bool ``[num_experts]``, where the kernels leave the union of a call.
    """

    layer_id: int
    index: int
    num_experts: int
    top_k: int
    router: Router
    table: PolicyTable
    kernel_table: KernelTable | None
    union: Tensor


@dataclass(frozen=True)
class Plan:
    """Which policy each row of one forward follows.

    Attributes:
        policy_ids: one per row, in row order.
        request_ids: request of each row, for the recorder.
        phase: SGLang's name of the forward mode.
        is_decode: whether every row is a decode token.
    """

    policy_ids: Sequence[int]
    request_ids: Sequence[str]
    phase: str
    is_decode: bool

    @property
    def reroutes(self) -> bool:
        return any(self.policy_ids)


@dataclass
class Runtime:
    """State of one process. The HTTP process has a config only; schedulers have layers too."""

    loaded: LoadedConfig
    artifacts: Mapping[str, SimilarityArtifact] = field(default_factory=dict)
    layers: Sequence[Layer] = ()
    kernels: str = ""
    experts: str = "sglang"
    policy_ids: Tensor | None = None
    workspace: Tensor | None = None
    statistics: Statistics | None = None
    recorder: Recorder | None = None
    plan: Plan | None = None
    is_capturing: bool = False
    num_calls: int = 0

    def __post_init__(self) -> None:
        self.config = self.loaded.config
        self.id_of = {name: index for index, name in enumerate(self.config.names)}
        self.acts_in_prefill = [p.engage.phase == "all" for p in self.config.definitions]

    def load_artifacts(self) -> None:
        """Read the similarity artifacts that policies use. Raises as `load_similarities` does."""
        used = {self.config.artifact_of(name) for name in self.config.names}
        artifacts = load_similarities(self.loaded)
        self.artifacts = {name: artifacts[name] for name in artifacts if name in used}

    @cached_property
    def cache_keys(self) -> list[str]:
        """Prefix of the KV cache namespace of every policy id; empty where KV is shared."""
        return [self._cache_key(policy_id) for policy_id in range(len(self.config.names))]

    def _cache_key(self, policy_id: int) -> str:
        """Namespace of one policy.

        It is a digest of the definition, so that equal policies share KV and a changed one
        never meets KV of its former self.
        """
        policy = self.config.definitions[policy_id]
        if self.config.prefix_cache == "shared" or isinstance(policy, Vanilla):
            return ""
        artifact = self.config.artifact_of(self.config.names[policy_id])
        content = policy.model_dump_json() + (self.artifacts[artifact].sha256 if artifact else "")
        return f"moe-routing:{hashlib.sha256(content.encode()).hexdigest()[:16]}|"

    def attach(self, layers: Sequence[Layer], device: torch.device, max_rows: int) -> None:
        """Take over the layers of the loaded model. Buffers never move: graphs bake them in."""
        self.layers = layers
        self.workspace = workspace(device)
        self.policy_ids = torch.full((max_rows,), PAD, dtype=torch.int32, device=device)
        if self.config.statistics:
            self.statistics = Statistics([layer.layer_id for layer in layers], device)
        self.recorder = Recorder.from_environment(self.config, layers)

    @contextmanager
    def forward(self, plan: Plan | None) -> Iterator[None]:
        """Run one forward under `plan`; None where no row can be re-routed."""
        if plan is not None:
            self._write(plan.policy_ids)
        previous, self.plan = self.plan, plan
        self.num_calls = 0
        try:
            yield
        finally:
            self.plan = previous

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Bake re-routing into the graphs that are captured meanwhile, all rows padded."""
        self._write([])
        previous, self.is_capturing = self.is_capturing, True
        self.num_calls = 0
        try:
            yield
            if self.num_calls == 0 or self.num_calls % len(self.layers):
                raise EngineError(
                    f"{self.num_calls} routing calls of {len(self.layers)} MoE layers while "
                    "graphs were captured: this model or MoE backend bypasses SGLang's TopK"
                )
        finally:
            self.is_capturing = previous
            if self.statistics:
                self.statistics.reset()

    def check_every_layer_asked(self) -> None:
        """After an eager forward under a plan: every layer must have come by exactly once."""
        if self.num_calls != len(self.layers):
            raise EngineError(
                f"{self.num_calls} of {len(self.layers)} MoE layers asked for their routing in "
                "one forward: this model or MoE backend bypasses SGLang's TopK"
            )

    def _write(self, policy_ids: Sequence[int]) -> None:
        assert self.policy_ids is not None
        if len(policy_ids) > len(self.policy_ids):
            raise EngineError(
                f"a forward has {len(policy_ids)} rows, the policy buffer {len(self.policy_ids)}"
            )
        self.policy_ids.fill_(PAD)
        host = torch.tensor(policy_ids, dtype=torch.int32)
        if self.policy_ids.is_cuda:
            host = host.pin_memory()  # fresh each step: the copy may outlive this call
        self.policy_ids[: len(policy_ids)].copy_(host, non_blocking=True)

    def reroute(
        self, layer: Layer, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Re-route the routed columns of one MoE call, in place.

        Shared-expert columns stay untouched.
        """
        plan, num_rows = self.plan, topk_ids.shape[0]
        if plan is None and not self.is_capturing:
            return topk_ids, topk_weights
        self.num_calls += 1
        if self.policy_ids is None or router_logits.shape != (num_rows, layer.num_experts):
            raise EngineError(
                f"layer {layer.layer_id}: router logits have shape {tuple(router_logits.shape)}, "
                f"expected {(num_rows, layer.num_experts)}"
            )
        is_padded = plan is not None and len(plan.policy_ids) < num_rows
        is_recording = self.recorder is not None and self.recorder.is_on
        counted = self.statistics if plan is None or plan.is_decode else None
        routed = slice(0, layer.top_k)
        ids, weights = topk_ids[:, routed], topk_weights[:, routed]
        is_vanilla = plan is not None and not (plan.reroutes or is_padded or is_recording)
        if is_vanilla and (counted is None or layer.kernel_table is None):
            if counted is not None:
                counted.count_vanilla(layer.index, ids, layer.num_experts)
            return topk_ids, topk_weights
        before = (ids.clone(), weights.clone()) if is_recording else (ids, weights)
        fits = layer.kernel_table is not None and num_rows <= MAX_ROWS
        run = self._reroute_in_kernels if fits else self._reroute_in_torch
        union = run(layer, ids, weights, router_logits, self.policy_ids[:num_rows], counted)
        if self.recorder and is_recording:
            after = (ids, weights, union)
            self.recorder.record(
                layer, plan, self.policy_ids[:num_rows], router_logits, before, after
            )
        return topk_ids, topk_weights

    def _reroute_in_kernels(
        self,
        layer: Layer,
        ids: Tensor,
        weights: Tensor,
        router_logits: Tensor,
        policy_ids: Tensor,
        statistics: Statistics | None,
    ) -> Tensor:
        assert layer.kernel_table is not None
        refine_out(
            router_logits,
            ids,
            weights,
            policy_ids,
            layer.kernel_table,
            layer.router,
            out_ids=ids,
            out_weights=weights,
            out_union=layer.union,
            statistics=None if statistics is None else statistics.of_layer(layer.index),
            workspace=self.workspace,
        )
        return layer.union

    def _reroute_in_torch(
        self,
        layer: Layer,
        ids: Tensor,
        weights: Tensor,
        router_logits: Tensor,
        policy_ids: Tensor,
        statistics: Statistics | None,
    ) -> Tensor:
        scores, gates = layer.router.score(router_logits, ids)
        outcome = reroute(
            scores,
            gates,
            ids,
            weights,
            policy_ids,
            layer.table,
            renormalize=layer.router.renormalize,
            scale=layer.router.scale,
        )
        if statistics is not None:
            statistics.count(layer.index, policy_ids, outcome)
        ids.copy_(outcome.topk_ids)
        weights.copy_(outcome.topk_weights)
        return outcome.union


_runtime: Runtime | None = None


def start(loaded: LoadedConfig) -> Runtime:
    """Create this process's runtime."""
    global _runtime
    _runtime = Runtime(loaded)
    return _runtime


def current() -> Runtime:
    """This process's runtime. Hooks are installed after `start`, so that it exists for them."""
    if _runtime is None:
        raise EngineError("the routing runtime of this process was never started")
    return _runtime
