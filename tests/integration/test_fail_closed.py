"""What must stop a server while it captures graphs or serves, and the message that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

topk = pytest.importorskip("sglang.srt.layers.moe.topk")
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import (  # noqa: E402
    DecodeCudaGraphRunner,
)

from sglang_moe_routing.errors import EngineError  # noqa: E402
from sglang_moe_routing.integration.hooks import HOOKS  # noqa: E402
from sglang_moe_routing.integration.marks import LAYER, PLAN  # noqa: E402
from sglang_moe_routing.kernels import choose  # noqa: E402
from sglang_moe_routing.runtime import Plan, Process, ServedModel, process  # noqa: E402

from .test_isolation import CPU, MAX_ROWS, NUM_EXPERTS, TOP_K, make_runtime  # noqa: E402

NUM_LAYERS = 3
PLAIN = topk.StandardTopKOutput(torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(2, 8))
RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    """This process's runtime, with three layers."""
    state = make_runtime(tmp_path, 1, "torch")
    (layer,) = state.model.layers
    layers = [replace(layer, layer_id=10 + i, index=i) for i in range(NUM_LAYERS)]
    state.served = ServedModel(layers, state.ids.table, CPU, MAX_ROWS, implementation=choose("cpu"))
    monkeypatch.setattr(process, "_current", state)
    return state


def ask(state: Process, layers: Sequence[int], num_rows: int = 4) -> None:
    """What a forward does with our hook: these layers come by."""
    for index in layers:
        logits = torch.randn(num_rows, NUM_EXPERTS)
        weights, ids = logits.softmax(dim=1).topk(TOP_K)
        state.model.reroute(state.model.layers[index], ids.int(), weights, logits)


def hooked(target: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` inside our hooks on `target`, as SGLang wraps it."""
    for hook in HOOKS:
        if hook.target == target:
            original = _around(hook.function, original)
    return original


def _around(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(original, *args, **kwargs)


def capture(state: Process, shapes: dict[int, Sequence[Sequence[int]]]) -> None:
    """Capture decode graphs of these sizes; each runs its forward as often as given.

    SGLang's runner, but for what needs a device: a size's runs ask the layers that it lists.
    """
    runs = {size: iter(asked) for size, asked in shapes.items()}

    def capture_one_shape(self: Any, size: int, forward: Callable[..., Any]) -> None:
        for _ in shapes[size]:
            forward(size)

    one_shape = hooked(f"{RUNNER}.capture_one_shape", capture_one_shape)

    def capture_all(self: Any) -> None:
        for size in shapes:
            one_shape(self, size, lambda size: ask(state, next(runs[size]), size))

    runner = object.__new__(DecodeCudaGraphRunner)
    runner.model_runner = SimpleNamespace(is_draft_worker=False)
    hooked(f"{RUNNER}.capture", capture_all)(runner)


def test_graphs_in_which_every_run_asks_every_layer_are_captured(state: Process) -> None:
    capture(state, {8: [(0, 1, 2)] * 3, 4: [(0, 1, 2)] * 3})


@pytest.mark.parametrize(
    "bypassing",
    [[()] * 3, [(0, 1, 2), (0, 1, 2), ()], [(0, 0, 1)] * 3, [(0, 1)] * 3],
    ids=["no layer", "warm-ups only", "one layer twice", "not the last layer"],
)
def test_one_shape_that_bypasses_the_routing_ends_the_process(
    state: Process, bypassing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        capture(state, {8: [(0, 1, 2)] * 3, 4: bypassing})
    assert ended.value.code == 78
    message = capsys.readouterr().err
    assert "cannot serve: in the decode graph of 4 requests, MoE layers" in message
    assert "of 3 did not ask for their routing, or not as often as in the first forward" in message
    assert "SGLANG_PLUGINS=moe_routing" in message


def test_graphs_that_another_runner_captures_end_the_process(state: Process) -> None:
    with pytest.raises(SystemExit):
        capture(state, {})


@dataclass
class Output:
    can_run_graph: bool = False


def forward(state: Process, layers: Sequence[int], num_rows: int = 4) -> None:
    """An eager forward of four re-routed rows inside our hook."""
    plan = Plan([1] * 4, [0] * 4, [""] * 4, "DECODE", is_decode=True)

    def original(self: Any, batch: Any) -> Output:
        ask(state, layers, num_rows)
        return Output()

    around = hooked("sglang.srt.model_executor.model_runner.ModelRunner._forward_raw", original)
    around(SimpleNamespace(is_draft_worker=False), SimpleNamespace(**{PLAN: plan}))


def test_a_forward_that_asks_every_layer_passes(state: Process) -> None:
    forward(state, (0, 1, 2))


TWICE = (0, 1, 2, 0, 1)
"""A model that shares the experts of its first two layers between several places."""


def test_a_model_that_asks_layers_several_times_is_served(state: Process) -> None:
    capture(state, {8: [TWICE] * 3, 4: [TWICE] * 3})
    forward(state, TWICE)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 1, 2, 0), (0, 1, 2, 0, 1, 2)], ids=str)
def test_a_place_that_shares_a_layer_and_bypasses_the_routing_ends_the_process(
    state: Process, layers: Sequence[int]
) -> None:
    forward(state, TWICE)
    with pytest.raises(SystemExit):
        forward(state, layers)
    with pytest.raises(SystemExit):
        capture(state, {8: [TWICE] * 3, 4: [TWICE, TWICE, layers]})


@pytest.mark.parametrize("layers", [(), (0, 1), (0, 1, 1)], ids=str)
def test_a_first_forward_that_skips_a_layer_ends_the_process(
    state: Process, layers: Sequence[int]
) -> None:
    with pytest.raises(SystemExit):
        forward(state, layers)


@pytest.mark.parametrize("layers", [(), (0, 1), (0, 1, 1), (0, 1, 2, 2)], ids=str)
def test_a_plugin_that_skips_the_router_ends_the_process_with_one_message(
    state: Process, layers: Sequence[int], capsys: pytest.CaptureFixture[str]
) -> None:
    forward(state, (0, 1, 2))
    with pytest.raises(SystemExit) as ended:
        forward(state, layers)
    assert ended.value.code == 78
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "in an eager forward, MoE layers [" in message
    assert "another plugin that skips or replaces a function of SGLang's router" in message


def test_rows_that_are_sharded_before_the_router_end_the_process(
    state: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody could tell which policies the rows of a shard follow."""
    with pytest.raises(SystemExit):
        forward(state, (0, 1, 2), num_rows=2)
    message = "layer 10: 2 rows came for their routing, but the forward has 4"
    assert message in capsys.readouterr().err


def select(hooked_select: Callable[..., Any], config: Any, **options: Any) -> Any:
    return hooked_select(
        hidden_states=torch.zeros(2, 8),
        router_logits=torch.randn(2, NUM_EXPERTS),
        topk_config=config,
        **options,
    )


def select_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for SGLang's `select_experts` with our hook after it."""
    (hook,) = (h for h in HOOKS if h.target == f"{topk.__name__}.select_experts")

    def after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hook.function(result, *args, **kwargs)
        return result

    return after


@pytest.mark.parametrize("is_ours", [False, True])
def test_packed_expert_ids_are_refused_in_our_layers(state: Process, is_ours: bool) -> None:
    config = topk.TopKConfig(top_k=TOP_K)

    def packs(**_: Any) -> Any:
        return topk.StandardTopKOutputPacked(*PLAIN, torch.zeros(2, 4))

    if not is_ours:
        select(select_hook(packs), config)
        return
    setattr(config, LAYER, state.model.layers[0])
    select(select_hook(lambda **_: PLAIN), config)
    with pytest.raises(EngineError, match=r"layer 10: SGLang packed the expert ids.*TOPK_PACK=0"):
        select(select_hook(packs), config)


def test_a_router_bias_per_token_is_refused_when_it_shows_up(state: Process) -> None:
    config = topk.TopKConfig(top_k=TOP_K, scoring_func="sigmoid")
    setattr(config, LAYER, state.model.layers[0])
    bias = torch.zeros(2, NUM_EXPERTS)
    with pytest.raises(EngineError, match="layer 10: a router bias that depends on the token"):
        select(select_hook(lambda **_: PLAIN), config, dynamic_expert_bias=bias)


def test_a_fused_router_that_skips_the_hook_is_refused(state: Process) -> None:
    (hook,) = (h for h in HOOKS if h.target == f"{topk.__name__}.build_precomputed_topk_output")
    config = topk.TopKConfig(top_k=TOP_K)
    hook.function(torch.ones(2, 4), torch.zeros(2, 4), config, 3)
    setattr(config, LAYER, state.model.layers[0])
    with pytest.raises(EngineError, match=r"layer 3: .*SGLANG_K3_FUSED_FRONT=0"):
        hook.function(torch.ones(2, 4), torch.zeros(2, 4), config, 3)
