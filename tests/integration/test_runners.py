"""Which MoE runner a loaded layer really uses, and what stands in the free slots of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sglang = pytest.importorskip("sglang")
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: E402
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher  # noqa: E402
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402
from sglang.srt.layers.moe.utils import MoeRunnerBackend  # noqa: E402
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase  # noqa: E402
from sglang.srt.layers.quantization.bitsandbytes import BitsAndBytesMoEMethod  # noqa: E402
from sglang.srt.layers.quantization.compressed_tensors import (  # noqa: E402
    compressed_tensors,
    schemes,
)
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod  # noqa: E402
from sglang.srt.layers.quantization.gguf import GGUFMoEMethod  # noqa: E402
from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod  # noqa: E402
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod  # noqa: E402
from sglang.srt.layers.quantization.w4afp8 import W4AFp8MoEMethod  # noqa: E402
from sglang.srt.runtime_context import get_context, get_flags  # noqa: E402

from sglang_moe_routing import environment  # noqa: E402
from sglang_moe_routing.cpu.experts import RUNNER, TORCH  # noqa: E402
from sglang_moe_routing.engine import compat, signatures  # noqa: E402
from sglang_moe_routing.errors import EngineError  # noqa: E402
from sglang_moe_routing.integration import runners  # noqa: E402
from sglang_moe_routing.integration.hooks.model import capture  # noqa: E402
from sglang_moe_routing.policies import FreeSlots  # noqa: E402
from tests.unit.test_docs import section, tables  # noqa: E402

SITE_PACKAGES = Path(sglang.__file__).parents[1]
ACCEPTED = [runner for runner in runners.NEWEST.values() if not runner.refused]


@contextmanager
def engine(backend: str = "auto", **arguments: Any) -> Iterator[None]:
    """SGLang's own arguments, in force meanwhile."""
    requested = MoeRunnerBackend(backend)
    config = get_context().override_server_args(**arguments)
    with config, get_flags().moe.override(runner_backend=requested):
        yield


def make_layer(method: FusedMoEMethodBase, scheme: Any = None) -> Any:
    """A layer as SGLang loads it, but for its weights: the method makes its own runner."""
    layer: Any = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(layer)
    layer.quant_method, layer.scheme, layer.moe_ep_size = method, scheme, 1
    layer.moe_runner_config = MoeRunnerConfig(num_experts=8, num_local_experts=8)
    method.create_moe_runner(layer, layer.moe_runner_config)
    layer.runner = getattr(method, "runner", None)
    if compat.BINDS_RUNNERS:
        layer.runner_backend = method.get_moe_runner_backend(layer)
    return layer


def unquantised() -> UnquantizedFusedMoEMethod:
    backend = get_flags().moe.runner_backend
    return UnquantizedFusedMoEMethod(
        use_flashinfer_trtllm_moe=backend.is_flashinfer_trtllm()
        or backend.is_flashinfer_trtllm_routed(),
        use_deep_gemm=backend.is_deep_gemm(),
    )


def fp8() -> Fp8MoEMethod:
    return Fp8MoEMethod(Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]))


@pytest.mark.parametrize("backend", MoeRunnerBackend, ids=lambda backend: backend.value)
def test_every_runner_of_the_engine_is_listed(backend: MoeRunnerBackend) -> None:
    assert backend.is_auto() or backend.value in runners.RUNNERS


def test_every_runner_takes_some_id_or_is_refused() -> None:
    for runner in runners.RUNNERS.values():
        assert (runner.skips_free or runner.takes_repeats) == (not runner.refused)
        assert runner.refused or runner.evidence or runner.name == environment.PLATFORM


def lines(runner: runners.Runner) -> Counter[tuple[str, str]]:
    """Parts of lines that must be there, and how often, by file."""
    return Counter(
        (path, text)
        for path, texts in runner.evidence.items()
        for text in ([texts] if isinstance(texts, str) else texts)
    )


def count(path: str, text: str) -> int:
    """How many lines of an installed file have it."""
    file = SITE_PACKAGES / path
    return sum(text in line for line in file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("runner", runners.RUNNERS.values(), ids=lambda runner: runner.name)
def test_the_evidence_stands_where_it_is_said_to_stand(runner: runners.Runner) -> None:
    wanted = lines(runner)
    assert not {where: times for where, times in wanted.items() if count(*where) < times}


def test_what_the_newest_release_shows_is_missing_where_a_runner_is_another() -> None:
    """Else it need not be another there."""
    for name in runners.OLDER.get(signatures.installed(), {}):
        wanted = lines(runners.NEWEST[name])
        assert any(count(*where) < times for where, times in wanted.items()), name


def test_limits_show_the_table_of_runners() -> None:
    text = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    shown = [row for row in tables(section(text, "## MoE runners")) if row[0].startswith("`")]
    accepted = [[f"`{r.name}`", yes(r.skips_free), yes(r.takes_repeats)] for r in ACCEPTED]
    refused = [[f"`{r.name}`", r.refused] for r in runners.NEWEST.values() if r.refused]
    assert shown == accepted + refused


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


@pytest.mark.parametrize(
    ("make", "asked", "used"),
    [
        (unquantised, "auto", "triton"),
        (unquantised, "triton", "triton"),
        (unquantised, "deep_gemm", "deep_gemm"),
        (unquantised, "flashinfer_cutlass", "flashinfer_cutlass"),
        (unquantised, "flashinfer_trtllm_routed", "flashinfer_trtllm_routed"),
        (unquantised, "marlin", "triton"),
        (fp8, "auto", "triton"),
        (fp8, "deep_gemm", "deep_gemm"),
        (fp8, "flashinfer_cutlass", "triton"),
        (fp8, "flashinfer_cutedsl", "triton"),
        (fp8, "flashinfer_trtllm", "flashinfer_trtllm"),
    ],
)
def test_the_runner_is_the_one_that_the_experts_chose(make: Any, asked: str, used: str) -> None:
    with engine(asked):
        layer = make_layer(make())
        assert runners.runner_name(layer) == used
        assert runners.free_slots(layer, "layer 3") is usual(used)


def usual(runner: str) -> FreeSlots:
    """What stands in free slots of its rows, where nothing maps ids later."""
    return FreeSlots.IGNORED if runners.RUNNERS[runner].skips_free else FreeSlots.REPEAT_FIRST


@pytest.mark.parametrize(
    ("method", "used"),
    [
        (W4AFp8MoEMethod, "cutlass_w4a8"),
        (GGUFMoEMethod, "gguf"),
        (BitsAndBytesMoEMethod, "triton"),
    ],
)
def test_experts_that_call_their_kernels_by_themselves_have_a_name(method: Any, used: str) -> None:
    with engine():
        layer = make_layer(object.__new__(method))
        assert runners.runner_name(layer) == used


def test_a_method_that_delegates_is_judged_by_its_scheme() -> None:
    method = object.__new__(compressed_tensors.CompressedTensorsFusedMoEMethod)
    scheme = object.__new__(schemes.CompressedTensorsWNA16MoE)
    with engine():
        layer = make_layer(method, scheme=scheme)
        layer.runner = scheme.runner
        assert runners.runner_name(layer) == "marlin"
        if runners.RUNNERS["marlin"].refused:
            with pytest.raises(EngineError, match="layer 3: MoE runner marlin"):
                runners.free_slots(layer, "layer 3")
        else:
            assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED
        layer.scheme = object.__new__(schemes.CompressedTensorsMxInt4MoE)
        with pytest.raises(EngineError, match="layer 3: experts that CompressedTensorsMxInt4MoE"):
            runners.free_slots(layer, "layer 3")


def test_experts_of_another_package_are_refused() -> None:
    class Foreign(UnquantizedFusedMoEMethod):
        pass

    with engine():
        layer = make_layer(Foreign())
        with pytest.raises(EngineError, match=r"experts that tests.*Foreign runs were never read"):
            runners.free_slots(layer, "layer 3")


def test_a_layer_that_runs_its_experts_in_its_own_way_is_refused() -> None:
    class Own(FusedMoE):
        def run_moe_core(self, dispatch_output: Any) -> Any:
            return dispatch_output

    with engine():
        layer = make_layer(unquantised())
        layer.__class__ = Own
        with pytest.raises(EngineError, match=r"experts that tests.*Own runs"):
            runners.free_slots(layer, "layer 3")


def test_a_runner_of_another_package_is_refused() -> None:
    def foreign() -> None:
        pass

    with engine():
        layer = make_layer(unquantised())
        layer.runner.fused_func = foreign
        with pytest.raises(EngineError, match=r"MoE runner tests.*foreign: it was not read"):
            runners.free_slots(layer, "layer 3")


@pytest.mark.parametrize("name", [r.name for r in runners.RUNNERS.values() if r.refused])
def test_a_refused_runner_is_named_with_the_reason_and_the_flag_that_works(name: str) -> None:
    with engine():
        layer = make_layer(unquantised())
        backend = SimpleNamespace(value=name)
        layer.runner, layer.runner_backend = SimpleNamespace(runner_backend=backend), backend
        with pytest.raises(EngineError) as error:
            runners.free_slots(layer, "layer 3")
    reason = runners.RUNNERS[name].refused
    assert str(error.value) == (
        f"layer 3: MoE runner {name}: {reason}; add --moe-runner-backend triton"
    )


@pytest.mark.skipif(
    not hasattr(MoeRunnerBackend, "LORA_TRITON"), reason="this release has no runners of LoRA's own"
)
def test_runners_of_lora_are_refused_though_the_base_has_another() -> None:
    with engine("triton"):
        layer = make_layer(unquantised())
    with engine("lora_triton"), pytest.raises(EngineError, match="MoE runner lora_triton: LoRA"):
        runners.free_slots(layer, "layer 3")


def test_engine_experts_on_a_cpu_are_refused_and_ours_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", environment.PLATFORM)
    with engine():
        layer = make_layer(unquantised())
        with pytest.raises(EngineError, match="MoE runner cpu: SGLang's own experts for CPUs"):
            runners.free_slots(layer, "layer 3")
        setattr(layer, RUNNER, TORCH)
        assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED


def test_ids_that_are_mapped_afterwards_repeat_or_are_refused() -> None:
    """A map's entry for -1 is that of the last expert."""
    with engine(ep_dispatch_algorithm="dynamic"):
        assert runners.free_slots(make_layer(unquantised()), "layer 3") is FreeSlots.REPEAT_FIRST
    with engine("deep_gemm", ep_dispatch_algorithm="dynamic"):
        layer = make_layer(unquantised())
        with pytest.raises(EngineError, match="unset --ep-dispatch-algorithm"):
            runners.free_slots(layer, "layer 3")


@pytest.mark.parametrize("keeps_free", [True, False])
def test_ids_that_expert_parallelism_maps_repeat_or_are_refused(
    monkeypatch: pytest.MonkeyPatch, keeps_free: bool
) -> None:
    """Where a free slot does not stay one."""
    monkeypatch.setattr(compat, "DISPATCH_KEEPS_FREE", keeps_free)
    with engine():
        layer = make_layer(unquantised())
        layer.moe_ep_size = 2
        expected = usual("triton") if keeps_free else FreeSlots.REPEAT_FIRST
        assert runners.free_slots(layer, "layer 3") is expected
    with engine("deep_gemm"):
        layer = make_layer(unquantised())
        assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED
        layer.moe_ep_size = 2
        if keeps_free:
            assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED
            return
        with pytest.raises(EngineError, match="unset --ep-size, or add"):
            runners.free_slots(layer, "layer 3")


def test_a_free_slot_becomes_what_we_say_where_ids_become_local() -> None:
    """By SGLang's own dispatcher, on the rank that has the last experts."""
    dispatcher: Any = object.__new__(StandardDispatcher)
    dispatcher.moe_ep_size, dispatcher.skip_local_expert_mapping = 2, False
    dispatcher.use_aiter_moe_runner = False
    dispatcher.local_expert_mapping = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    ids = torch.tensor([[3, -1], [0, -1]])
    given = StandardTopKOutput(torch.zeros(2, 2), ids, torch.zeros(2, 4))
    with engine():
        found = dispatcher.dispatch(torch.zeros(2, 8), given).topk_output.topk_ids
    free = -1 if compat.DISPATCH_KEEPS_FREE else 1
    assert found.tolist() == [[1, free], [-1, free]]


def test_the_kernel_for_few_nvfp4_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = object.__new__(ModelOptNvFp4FusedMoEMethod)
    with engine("flashinfer_cutlass"):
        layer = make_layer(method)
        layer.moe_runner_config.is_gated = False
        assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED
        monkeypatch.setattr(runners, "is_sm120", lambda: True)
        with pytest.raises(EngineError, match=r"reads every id.*--moe-runner-backend marlin"):
            runners.free_slots(layer, "layer 3")
        layer.moe_runner_config.is_gated = True
        assert runners.free_slots(layer, "layer 3") is FreeSlots.IGNORED


def test_captured_ids_name_an_expert_in_every_slot() -> None:
    layer: Any = SimpleNamespace(free_slots=FreeSlots.IGNORED, top_k=3)
    ids = torch.tensor([[5, -1, -1, 8], [7, 2, -1, 8], [4, 6, 1, 8], [-1, -1, -1, 8]])
    expected = [[5, 5, 5, 8], [7, 2, 7, 8], [4, 6, 1, 8], [0, 0, 0, 8]]
    assert capture.name_free_slots(layer, ids).tolist() == expected
    assert ids[0].tolist() == [5, -1, -1, 8]
