"""The re-routing of the model that a scheduler serves."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from .. import environment
from ..errors import EngineError
from ..kernels import (
    MAX_ROWS,
    NOT_COUNTED,
    REFERENCE,
    BoundLayer,
    Implementation,
    workspace,
    written_in_torch,
)
from ..policies import PolicyTable, reroute
from .definitions import Definition
from .plan import Call, Layer, Plan, Step
from .recorder import Recorder
from .rows import RowViews
from .statistics import AFTER, BEFORE, GROUPS, Statistics, count
from .weights import NO_WEIGHTS, ServedWeights

_BYPASSED = (
    "another plugin that skips or replaces a function of SGLang's router, this model, or its MoE "
    f"backend bypasses the re-routing: try SGLANG_PLUGINS={environment.PLUGIN}, then "
    "--moe-runner-backend triton"
)


class ServedModel:
    """The routed layers of a loaded model, and what all its forwards share.

    Its buffers never move: captured graphs bake them in.

    Args:
        layers: in layer order.
        definitions: by policy id, as `PolicyIds.table` holds them; read anew at every forward.
        max_rows: of one forward, at most.
        implementation: what re-routes layers that have kernels.
        num_groups: isolation groups.
        has_statistics: whether active experts and rows are counted.
        has_graphs: whether decode steps replay captured graphs.

    Attributes:
        weights: those that are served.
        experts: what runs the experts, in words.
        has_run: whether a batch has come.
        reading: held while another thread reads the device, or graphs are captured: CUDA forbids
            both at a time.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        definitions: Sequence[Definition],
        device: torch.device,
        max_rows: int,
        *,
        implementation: Implementation,
        num_groups: int = 1,
        has_statistics: bool = True,
        has_graphs: bool = False,
        weights: ServedWeights = NO_WEIGHTS,
        experts: str = "",
    ) -> None:
        self.layers = layers
        self.has_graphs = has_graphs
        self.weights = weights
        self.experts = experts
        self.has_run = False
        self.reading = threading.Lock()
        self.statistics: Statistics | None = None
        if has_statistics:
            most = max(layer.num_experts for layer in layers)
            sizes = [(layer.layer_id, layer.top_k) for layer in layers]
            self.statistics = Statistics(sizes, device, most, num_groups)
        self._implementation = implementation
        self._definitions = definitions
        self._rows = RowViews(num_groups, max_rows, device)
        self._recorder = Recorder.from_environment(definitions, layers)
        self._workspace = workspace(device)
        self._step: Step | None = None
        self._captured_rows = 0
        self._times_asked: Counter[int] = Counter()  # in one forward, as the first has shown
        for layer in layers:
            self.bind(layer)

    @property
    def kernels(self) -> str:
        """What re-routes the layers, and if that is the reference, why."""
        without = next((layer for layer in self.layers if not layer.uses_kernels), None)
        if without is None:
            return self._implementation.name
        if self._implementation.is_native:
            return f"{REFERENCE}: {written_in_torch(without.table)}"
        return f"{REFERENCE}: {self._implementation.reason}"

    @property
    def plan(self) -> Plan | None:
        """That of the forward under way."""
        return self._step.plan if self._step else None

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
            workspace=self._workspace,
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
    def forward(self, plan: Plan) -> Iterator[None]:
        """Run one forward under `plan`."""
        step = Step(plan, passed=[] if self._lets_pass(plan) else None)
        if self.has_graphs:  # a replay asks nobody
            self._write_rows(step, self._captured_rows)
        if plan.is_decode and self.statistics:
            self.statistics.rows.add(plan.policy_ids, plan.group_ids, self._definitions)
        with self._during(step):
            yield
            if step.passed and self.statistics:
                self.statistics.count_vanilla(step.passed)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Bake re-routing into the graphs that are captured meanwhile, all rows padded."""
        self._rows.write([], [])
        step = Step(plan=None)
        ignoring = self.statistics.ignoring() if self.statistics else nullcontext()
        with self._during(step), ignoring:
            yield
        if step.num_graph_runs == 0:
            raise EngineError(
                f"no decode graph was captured by SGLang's own decode graph runner; {_BYPASSED}"
            )

    @contextmanager
    def as_captured(self) -> Iterator[None]:
        """Run the captured forward again where replays are emulated: no host state reaches it."""
        with self._during(Step(plan=None)):
            yield

    @contextmanager
    def _during(self, step: Step) -> Iterator[None]:
        previous, self._step = self._step, step
        try:
            yield
        finally:
            self._step = previous

    @contextmanager
    def graph_forward(self, name: str) -> Iterator[None]:
        """Run a graph's forward once: to warm up, to capture, or again where replays are Python.

        Every run is held to its layers: what a warm-up asks says nothing about what is captured.
        """
        step = self._step
        if step is None:  # nobody would be counted
            yield
            return
        step.asked.clear()
        yield
        self.check_every_layer_asked(name)
        step.num_graph_runs += 1

    def check_every_layer_asked(self, name: str = "an eager forward") -> None:
        """After a forward, graph or eager: every layer must have come by, always equally often.

        Most models ask each layer once; some share the experts of a layer between several places.

        Raises:
            EngineError: in `name` some layers did not, or not as often as in the first forward.
        """
        asked = Counter(self._step.asked if self._step else ())
        expected = self._times_asked or asked
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
        self._times_asked = asked

    def reroute(
        self, layer: Layer, topk_ids: Tensor, topk_weights: Tensor, router_logits: Tensor
    ) -> None:
        """Re-route the routed columns of one MoE call, in place; outside a forward, leave them.

        Shared-expert columns stay untouched.
        """
        step = self._step
        if step is None:
            return
        step.asked.append(layer.index)
        num_rows, num_columns = topk_ids.shape
        self._check_rows(step, layer, num_rows, router_logits)
        plan = step.plan
        if step.passed is not None and plan is not None and len(plan.policy_ids) == num_rows:
            if self.statistics is not None:
                step.passed.append((layer.index, topk_ids))
            return
        if plan is not None:
            self._write_rows(step, num_rows)
        else:
            self._captured_rows = max(self._captured_rows, num_rows)
        if num_columns > layer.top_k:
            topk_ids, topk_weights = topk_ids[:, : layer.top_k], topk_weights[:, : layer.top_k]
        call = layer, num_rows, router_logits, topk_ids, topk_weights
        counts = self.statistics is not None and step.counts
        if self._rows.num_groups > 1:
            self._reroute_by_group(Call(*call), counts)
        elif self._is_recording:
            self._reroute_and_record(Call(*call), counts)
        else:
            self._run(*call, self._rows.policy_ids(0, num_rows), GROUPS if counts else NOT_COUNTED)

    def _check_rows(self, step: Step, layer: Layer, num_rows: int, router_logits: Tensor) -> None:
        if router_logits.shape != (num_rows, layer.num_experts):
            raise EngineError(
                f"layer {layer.layer_id}: router logits have shape {tuple(router_logits.shape)}, "
                f"expected {(num_rows, layer.num_experts)}"
            )
        plan = step.plan
        if plan is not None and plan.reroutes and num_rows < len(plan.policy_ids):
            raise EngineError(
                f"layer {layer.layer_id}: {num_rows} rows came for their routing, but the forward "
                f"has {len(plan.policy_ids)}: it is not known which policies they follow"
            )

    def _write_rows(self, step: Step, num_rows: int) -> None:
        """Bring the rows of this forward to the device, once and only if somebody needs them.

        Args:
            num_rows: of a call, padded ones included.
        """
        assert step.plan is not None
        if not step.is_written or num_rows > self._rows.num_rows:
            self._rows.write(step.plan.policy_ids, step.plan.group_ids, num_rows)
            step.is_written = True

    def _lets_pass(self, plan: Plan) -> bool:
        """Whether the calls of a forward need no more than to be counted, if no row is padded."""
        if plan.reroutes or not plan.is_decode or self._is_recording:
            return False
        return self.statistics is None or self.statistics.defers

    def _reroute_and_record(self, call: Call, counts: bool) -> None:
        policy_ids, before = self._rows.policy_ids(0, call.num_rows), call.clone()
        union = self._run(*call, policy_ids, GROUPS if counts else NOT_COUNTED)
        self._record(policy_ids, before, call, union)

    def _reroute_by_group(self, call: Call, counts: bool) -> None:
        """One pass per isolation group, in which the rows of the other groups are padding."""
        is_recording = self._is_recording
        before, live = call.clone(), self._rows.live(call.num_rows)
        if counts:  # T is a matter of all rows together: count them as vanilla
            self._run(*before.clone(), live, BEFORE)
        for group in self._rows.groups_to_run(is_capturing=self.plan is None):
            policy_ids = self._rows.policy_ids(group, call.num_rows)
            mine = before.clone()
            union = self._run(*mine, policy_ids, GROUPS if counts else NOT_COUNTED)
            if is_recording:
                self._record(policy_ids, before, mine, union)
            call.take(self._rows.of_group(group, call.num_rows), mine)
        if counts:
            self._run(*call.clone(), live, AFTER)

    @property
    def _is_recording(self) -> bool:
        """Ask once per call: it may change at any time."""
        return self._recorder is not None and self._recorder.is_on

    def _record(self, policy_ids: Tensor, before: Call, after: Call, union: Tensor) -> None:
        assert self._recorder is not None
        self._recorder.record(
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
