"""What one process knows about routing: the config, the layers, and the batch being run."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import environment
from ..artifacts import SimilarityArtifact
from ..config import LoadedConfig
from ..errors import EngineError
from ..kernels import MAX_ROWS, NOT_COUNTED, BoundLayer, workspace
from ..policies import PolicyTable, reroute
from .definitions import Definition, PolicyIds, define
from .plan import Call, Layer, Plan
from .recorder import Recorder
from .rows import RowCounts, RowViews
from .similarity import load_similarities
from .statistics import AFTER, BEFORE, GROUPS, Statistics, count
from .weights import NO_WEIGHTS, ServedWeights

_BYPASSED = (
    "another plugin that skips or replaces a function of SGLang's router, this model, or its MoE "
    f"backend bypasses the re-routing: try SGLANG_PLUGINS={environment.PLUGIN}, then "
    "--moe-runner-backend triton"
)


@dataclass
class Runtime:
    """State of one process. The HTTP process has a config only; schedulers have layers too."""

    loaded: LoadedConfig
    artifacts: Mapping[str, SimilarityArtifact] = field(default_factory=dict)
    layers: Sequence[Layer] = ()
    weights: ServedWeights = NO_WEIGHTS
    kernels: str = ""
    experts: str = "sglang"
    has_graphs: bool = False
    rows: RowViews | None = None
    row_counts: RowCounts | None = None
    rejections: Counter[str] = field(default_factory=Counter)
    workspace: Tensor | None = None
    statistics: Statistics | None = None
    recorder: Recorder | None = None
    plan: Plan | None = None
    is_capturing: bool = False
    captured_rows: int = 0
    has_run: bool = False
    is_written: bool = False
    passed: list[tuple[int, Tensor]] | None = None
    asked: list[int] = field(default_factory=list)
    expected: Counter[int] = field(default_factory=Counter)
    """How often each layer asks in a forward, as the first one has shown."""
    num_captured: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)
    """Held while another thread reads the device, or graphs are captured: CUDA forbids both."""

    def __post_init__(self) -> None:
        self.config = self.loaded.config
        self.ids = PolicyIds(define(self.loaded, self.artifacts))

    def adopt(
        self,
        loaded: LoadedConfig,
        artifacts: Mapping[str, SimilarityArtifact],
        table: Sequence[Definition] | None = None,
    ) -> None:
        """Put a reloaded config into force for requests that come from now on.

        Args:
            table: definitions by policy id that the layers' tables were made of.
        """
        definitions = define(loaded, artifacts)
        self.ids.adopt(table or self.ids.with_config(definitions), definitions)
        self.loaded, self.config, self.artifacts = loaded, loaded.config, artifacts

    def attach(self, layers: Sequence[Layer], device: torch.device, max_rows: int) -> None:
        """Take over the layers of the loaded model. Buffers never move: graphs bake them in."""
        self.layers = layers
        self.workspace = workspace(device)
        groups = self.config.isolation.groups
        self.rows = RowViews(len(groups), max_rows, device)
        if self.config.statistics:
            most = max(layer.num_experts for layer in layers)
            sizes = [(layer.layer_id, layer.top_k) for layer in layers]
            self.statistics = Statistics(sizes, device, most, len(groups))
            self.row_counts = RowCounts()
        self.recorder = Recorder.from_environment(self.ids.table, layers)
        for layer in layers:
            self.bind(layer)

    def bind(self, layer: Layer) -> None:
        """Let the kernels know what all calls of `layer` have in common, its table above all."""
        layer.kernels = None
        if not layer.uses_kernels:
            return
        sums = self.statistics
        layer.kernels = BoundLayer(
            layer.table,
            layer.router,
            layer.union,
            top_k=layer.top_k,
            statistics=None if sums is None else sums.of_layer(layer.index),
            workspace=self.workspace,
            free_slots=layer.free_slots,
        )

    def adopt_table(self, layer: Layer, table: PolicyTable) -> None:
        """Route `layer` by `table` from now on. Captured graphs hold the tensors of the old one."""
        if self.has_graphs:
            layer.table.rewrite(table)
        else:
            layer.table = table
            self.bind(layer)

    @contextmanager
    def forward(self, plan: Plan | None) -> Iterator[None]:
        """Run one forward under `plan`; None where no row can be re-routed."""
        if plan is not None:
            self.is_written = False
            if self.has_graphs:  # a replay asks nobody
                self._write_rows(plan, self.captured_rows)
            if plan.is_decode and self.row_counts:
                self.row_counts.add(plan.policy_ids, plan.group_ids, self.ids.table)
            self.passed = [] if self._lets_pass(plan) else None
        previous, self.plan = self.plan, plan
        self.asked.clear()
        try:
            yield
            if self.passed and self.statistics:
                self.statistics.count_vanilla(self.passed)
        finally:
            self.plan, self.passed = previous, None

    def _write_rows(self, plan: Plan, num_rows: int) -> None:
        """Bring the rows of this forward to the device, once and only if somebody needs them.

        Args:
            num_rows: of a call, padded ones included.
        """
        assert self.rows is not None
        if not self.is_written or num_rows > self.rows.num_rows:
            self.rows.write(plan.policy_ids, plan.group_ids, num_rows)
            self.is_written = True

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Bake re-routing into the graphs that are captured meanwhile, all rows padded."""
        assert self.rows is not None
        self.rows.write([], [])
        previous, self.is_capturing = self.is_capturing, True
        self.num_captured = 0
        try:
            with self.statistics.ignoring() if self.statistics else nullcontext():
                yield
            if self.num_captured == 0:
                raise EngineError(
                    f"no decode graph was captured by SGLang's own decode graph runner; {_BYPASSED}"
                )
        finally:
            self.is_capturing = previous

    @contextmanager
    def graph_forward(self, name: str) -> Iterator[None]:
        """Run a graph's forward once: to warm up, to capture, or again where replays are Python.

        Every run is held to its layers: what a warm-up asks says nothing about what is captured.
        """
        if self.plan is None and not self.is_capturing:  # nobody would be counted
            yield
            return
        self.asked.clear()
        yield
        self.check_every_layer_asked(name)
        self.num_captured += 1

    def check_every_layer_asked(self, name: str = "an eager forward") -> None:
        """After a forward, graph or eager: every layer must have come by, always equally often.

        Most models ask each layer once; some share the experts of a layer between several places.

        Raises:
            EngineError: in `name` some layers did not, or not as often as in the first forward.
        """
        asked = Counter(self.asked)
        expected = self.expected or asked
        wrong = [
            layer.layer_id
            for layer in self.layers
            if not asked[layer.index] or asked[layer.index] != expected[layer.index]
        ]
        if wrong:
            raise EngineError(
                f"in {name}, MoE layers {wrong} of {len(self.layers)} did not ask for their "
                f"routing, or not as often as in the first forward; {_BYPASSED}"
            )
        self.expected = asked

    def reroute(
        self, layer: Layer, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> None:
        """Re-route the routed columns of one MoE call, in place.

        Shared-expert columns stay untouched.
        """
        plan, rows = self.plan, self.rows
        if plan is None and not self.is_capturing:
            return
        self.asked.append(layer.index)
        num_rows, num_columns = topk_ids.shape
        if rows is None or router_logits.shape != (num_rows, layer.num_experts):
            raise EngineError(
                f"layer {layer.layer_id}: router logits have shape {tuple(router_logits.shape)}, "
                f"expected {(num_rows, layer.num_experts)}"
            )
        if plan is not None and plan.reroutes and num_rows < len(plan.policy_ids):
            raise EngineError(
                f"layer {layer.layer_id}: {num_rows} rows came for their routing, but the forward "
                f"has {len(plan.policy_ids)}: it is not known which policies they follow"
            )
        if self.passed is not None and plan is not None and len(plan.policy_ids) == num_rows:
            if self.statistics is not None:
                self.passed.append((layer.index, topk_ids))
            return
        if plan is not None:
            self._write_rows(plan, num_rows)
        else:
            self.captured_rows = max(self.captured_rows, num_rows)
        if num_columns > layer.top_k:
            topk_ids, topk_weights = topk_ids[:, : layer.top_k], topk_weights[:, : layer.top_k]
        call = layer, num_rows, router_logits, topk_ids, topk_weights
        counts = self.statistics is not None and (plan is None or plan.is_decode)
        if rows.num_groups > 1:
            self._reroute_by_group(Call(*call), counts)
        elif self.is_recording:
            self._reroute_and_record(Call(*call), counts)
        else:
            self._run(*call, rows.policy_ids(0, num_rows), GROUPS if counts else NOT_COUNTED)

    def _lets_pass(self, plan: Plan) -> bool:
        """Whether the calls of a forward need no more than to be counted, if no row is padded."""
        if plan.reroutes or not plan.is_decode or self.is_recording:
            return False
        return self.statistics is None or self.statistics.defers

    def _reroute_and_record(self, call: Call, counts: bool) -> None:
        assert self.rows is not None
        policy_ids, before = self.rows.policy_ids(0, call.num_rows), call.clone()
        union = self._run(*call, policy_ids, GROUPS if counts else NOT_COUNTED)
        self._record(policy_ids, before, call, union)

    def _reroute_by_group(self, call: Call, counts: bool) -> None:
        """One pass per isolation group, in which the rows of the other groups are padding."""
        assert self.rows is not None
        is_recording = self.is_recording
        before, live = call.clone(), self.rows.live(call.num_rows)
        if counts:  # T is a matter of all rows together: count them as vanilla
            self._run(*before.clone(), live, BEFORE)
        for group in self.rows.groups_to_run(is_capturing=self.plan is None):
            policy_ids = self.rows.policy_ids(group, call.num_rows)
            mine = before.clone()
            union = self._run(*mine, policy_ids, GROUPS if counts else NOT_COUNTED)
            if is_recording:
                self._record(policy_ids, before, mine, union)
            call.take(self.rows.of_group(group, call.num_rows), mine)
        if counts:
            self._run(*call.clone(), live, AFTER)

    @property
    def is_recording(self) -> bool:
        """Ask once per call: it may change at any time."""
        return self.recorder is not None and self.recorder.is_on

    def _record(self, policy_ids: Tensor, before: Call, after: Call, union: Tensor) -> None:
        assert self.recorder is not None
        self.recorder.record(
            after.layer,
            self.plan,
            policy_ids,
            after.router_logits,
            (before.ids, before.weights),
            (after.ids, after.weights, union),
        )

    def _run(
        self,
        layer: Layer,
        num_rows: int,
        router_logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        policy_ids: Tensor,
        part: int,
    ) -> Tensor:
        """Re-route a `Call` in place, add to a part of the statistics; the union."""
        kernels, router = layer.kernels, layer.router
        if kernels is not None and num_rows <= MAX_ROWS:
            kernels.reroute(router_logits, ids, weights, policy_ids, router.bias, part)
            return layer.union
        scores, gates = router.score(router_logits, ids)
        outcome = reroute(
            scores,
            gates,
            ids,
            weights,
            policy_ids,
            layer.table,
            renormalize=router.renormalize,
            scale=router.scale,
            free_slots=layer.free_slots,
        )
        if part != NOT_COUNTED:
            assert self.statistics is not None
            count(self.statistics.of_layer(layer.index)[part], policy_ids, outcome)
        ids.copy_(outcome.topk_ids)
        weights.copy_(outcome.topk_weights)
        return outcome.union


_runtime: Runtime | None = None


def start(loaded: LoadedConfig) -> Runtime:
    """Create this process's runtime. Raises as `load_similarities` does."""
    global _runtime
    _runtime = Runtime(loaded, used_artifacts(loaded))
    return _runtime


def used_artifacts(loaded: LoadedConfig) -> dict[str, SimilarityArtifact]:
    """Read all similarity artifacts; those that policies use. Raises as `load_similarities`."""
    used = {loaded.config.artifact_of(name) for name in loaded.config.names}
    artifacts = load_similarities(loaded)
    return {name: artifacts[name] for name in artifacts if name in used}


def current() -> Runtime:
    """This process's runtime. Hooks are installed after `start`, so that it exists for them."""
    if _runtime is None:
        raise EngineError("the routing runtime of this process was never started")
    return _runtime
