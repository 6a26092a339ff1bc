"""What runs on GPUs only, entered on a CPU up to its first call of CUDA.

docs/kernels.md lists all of it. Fake tensors are torch's own: they have a device and no memory.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("sglang")
from sglang.srt.layers.moe.topk import fused_topk

from sglang_moe_routing import environment
from sglang_moe_routing.engine.report import Inspection
from sglang_moe_routing.engine.topk import engine_topk
from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration import attach, inspection, reloading
from sglang_moe_routing.kernels import native, ops
from sglang_moe_routing.runtime import Process
from sglang_moe_routing.runtime.rows import RowViews
from sglang_moe_routing.runtime.statistics import Statistics

from .test_isolation import make_runtime

GPU = torch.device("cuda")
NO_GPU = r"NVIDIA|accelerator|CUDA"
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def runtime(tmp_path: Path) -> Process:
    return make_runtime(tmp_path, 1, "torch")


def test_nvidia_gpus_are_a_platform_to_serve_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    attach._check_platform(GPU)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(EngineError, match="this rocm platform"):
        attach._check_platform(GPU)


def test_a_cpu_is_one_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    with pytest.raises(EngineError, match=f"set SGLANG_PLATFORM={environment.PLATFORM}"):
        attach._check_platform(torch.device("cpu"))
    monkeypatch.setenv("SGLANG_PLATFORM", environment.PLATFORM)
    attach._check_platform(torch.device("cpu"))


@on_a_cpu
def test_the_kernels_of_a_gpu_are_those_of_its_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(native.CHOICE, raising=False)
    with pytest.raises(RuntimeError, match=NO_GPU):
        native.choose("cuda")
    with FakeTensorMode(), pytest.raises(RuntimeError, match=NO_GPU):
        ops._module(torch.empty(1, device=GPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=NO_GPU):
        inspection._inspect_kernels(Inspection(), None)


def test_calls_of_two_launches_get_a_workspace() -> None:
    with FakeTensorMode():
        assert ops._new_workspace(torch.empty(ops.ONE_LAUNCH_ROWS, 8, device=GPU)) is None
        found = ops._new_workspace(torch.empty(ops.ONE_LAUNCH_ROWS + 1, 8, device=GPU))
    assert found is not None
    assert found.device.type == "cuda"


def test_steps_on_a_gpu_are_counted_call_by_call() -> None:
    with FakeTensorMode():
        assert not Statistics([(0, 2)], GPU, num_experts=4).defers
    assert Statistics([(0, 2)], torch.device("cpu"), num_experts=4).defers


@on_a_cpu
@pytest.mark.parametrize("num_groups", [1, 2])
def test_rows_go_to_a_gpu_from_pinned_memory(num_groups: int) -> None:
    with FakeTensorMode():
        views = RowViews(num_groups, 8, GPU)
    with pytest.raises(RuntimeError, match=NO_GPU):
        views.write([1], [0])


@on_a_cpu
def test_a_reload_waits_for_the_step_in_flight(runtime: Process) -> None:
    with FakeTensorMode():
        runtime.model.layers[0].union = torch.zeros(1, dtype=torch.bool, device=GPU)
    layer, new = runtime.model.layers[0], object()
    with pytest.raises(RuntimeError, match=NO_GPU):
        reloading._commit(runtime, SimpleNamespace(layers=[(layer, new, None)]))
    assert layer.table is not new


def test_sglangs_top_k_on_a_gpu_is_the_one_that_it_serves_with() -> None:
    with FakeTensorMode():
        call = engine_topk(torch.empty(2, 8, device=GPU), 2)
    assert fused_topk in [cell.cell_contents for cell in call.__closure__]
