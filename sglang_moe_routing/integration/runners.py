"""SGLang's MoE runners: which ids each takes in the slots that hold no expert.

Final rows hold distinct experts, so that slots are left over. What stands in them is chosen here
for every layer when the model is loaded. A runner, or a kind of experts, that is not listed was
not read: it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils.common import is_sm120

from .. import environment
from ..cpu.experts import RUNNER
from ..engine import compat, signatures
from ..errors import EngineError
from ..policies import FreeSlots


@dataclass(frozen=True)
class Source:
    """A line that shows what a runner does.

    Attributes:
        path: file below site-packages, of SGLang or flashinfer.
        text: a part of the line.
        times: how many lines of the file must have it.
    """

    path: str
    text: str
    times: int = 1


@dataclass(frozen=True)
class Runner:
    """What runs the experts of a layer.

    Attributes:
        name: its value of ``--moe-runner-backend``; a name of ours where a kind of experts calls
            its kernels by itself.
        skips_free: whether a slot with id -1 loads no expert and adds nothing.
        takes_repeats: whether a row may name an expert in several slots.
        refused: why no layer may run on it; empty where layers may.
        sources: what shows the first two.
    """

    name: str
    skips_free: bool = False
    takes_repeats: bool = False
    refused: str = ""
    sources: tuple[Source, ...] = ()


_OPS = "sglang/kernels/ops/moe"
_LORA_OPS = "sglang/kernels/ops/lora/moe"
_JIT = "sglang/kernels/jit/csrc"
_LAYERS = "sglang/srt/layers"
_FUSED = "flashinfer/data/csrc/fused_moe"
_ROUTING = "flashinfer/data/include/flashinfer/trtllm/fused_moe/RoutingKernel.cuh"

_ALIGN = (
    Source(f"{_JIT}/moe/moe_align_kernel.cu", "expert_id = topk_ids[i] + 1"),
    Source(f"{_OPS}/moe_align_small_numel.py", "expert -1 (EP-filtered) maps to bucket 0"),
)
_ADAPTERS = (  # of LoRA on experts, put in after the model was loaded and judged
    Source("sglang/srt/lora/lora_moe_runners.py", "= cur_expert"),
    Source(f"{_JIT}/lora/moe_lora_align_kernel.cu", "expert_id < 0", times=4),
    Source(f"{_LORA_OPS}/fused_moe_lora_kernel.py", "if expert_id == -1"),
    Source(f"{_LORA_OPS}/virtual_experts.py", "valid_base = base >= 0"),
    Source(f"{_LORA_OPS}/virtual_experts.py", "if off_expert == -1"),
    Source(f"{_LORA_OPS}/virtual_experts.py", "valid_mask = (flat_topk_ids >= 0)"),
)
_TRTLLM = (
    Source(
        f"{_FUSED}/trtllm_backend/trtllm_fused_moe_routing_custom.cuh",
        "if (expertIdx > -1 && expertIdx < params.mNumExperts)",
    ),
    Source(_ROUTING, "isLocalExpert ? atomicAdd"),
    Source(f"{_FUSED}/trtllm_backend/trtllm_fused_moe_dev_kernel.cu", "if (permutedIdx == -1)"),
    Source(
        f"{_FUSED}/trtllm_backend/trtllm_fused_moe_routing_custom.cuh",
        "when duplicate expert IDs appear, multiple",
    ),
)
_CUTLASS = (
    Source(
        f"{_FUSED}/cutlass_backend/cutlass_fused_moe_kernels.cuh",
        "if (expert_id < 0 || expert_id >= num_experts_per_node)",
    ),
    Source(
        f"{_FUSED}/cutlass_backend/cutlass_fused_moe_kernels.cuh",
        "expert >= start_expert && expert < end_expert",
    ),
    Source(
        f"{_FUSED}/cutlass_backend/cutlass_fused_moe_kernels.cuh",
        "expanded_token_id = i * num_tokens + token_id;",
    ),
)

_PLATFORM = "its platform is not supported"
_LORA = "LoRA's own runners were not read"

NEWEST: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        Runner(
            "triton",
            skips_free=True,
            takes_repeats=True,
            sources=(
                *_ALIGN,
                Source(f"{_OPS}/fused_moe_triton_kernels.py", "inactive_expert = off_experts"),
                Source(f"{_OPS}/fused_moe_triton_kernels.py", "including without EP"),
                *_ADAPTERS,
            ),
        ),
        Runner(
            "deep_gemm",
            skips_free=True,
            sources=(
                Source(f"{_OPS}/ep_moe_kernels.py", "(expert >= 0) & (expert < num_experts)"),
                Source(f"{_OPS}/ep_moe_kernels.py", "valid = (expert_id >= 0)"),
                Source(f"{_OPS}/ep_moe_kernels.py", "if dst_idx >= 0"),
                Source(f"{_OPS}/ep_moe_kernels.py", "Each token picks top_k distinct"),
            ),
        ),
        Runner(
            "marlin",
            skips_free=True,
            takes_repeats=True,
            sources=(
                *_ALIGN,
                Source(f"{_JIT}/moe/align_single_token.cuh", "other == my_id && j < lane"),
                Source(
                    f"{_JIT}/gemm/marlin_moe/marlin_template.h",
                    "parallel -= inactive_prefix_blocks",
                ),
                Source(
                    f"{_JIT}/gemm/marlin_moe/marlin_template.h",
                    "num_invalid_blocks += expert_ids_ptr[i] == -1",
                ),
                Source("sglang/srt/lora/lora_moe_runner_marlin.py", "zero_inactive_output=True"),
                *_ADAPTERS,
            ),
        ),
        Runner(
            "cutlass",
            skips_free=True,
            takes_repeats=True,
            sources=(
                Source(f"{_JIT}/moe/cutlass_prepare_moe_input.cuh", "= -1;"),
                Source(f"{_JIT}/moe/cutlass_prepare_moe_input.cuh", "atomicAdd(&cursor, 1)"),
                Source(f"{_JIT}/moe/shuffle_weighted_sum.cuh", "active = row >= 0"),
            ),
        ),
        Runner(
            "cutlass_w4a8",
            skips_free=True,
            takes_repeats=True,
            sources=(
                Source(f"{_JIT}/moe/cutlass_prepare_moe_input.cuh", "atomicAdd(&cursor, 1)"),
                Source(f"{_OPS}/ep_moe_kernels.py", "if (expert_id >= 0)", times=2),
            ),
        ),
        Runner("flashinfer_cutlass", skips_free=True, sources=_CUTLASS),
        Runner("flashinfer_trtllm", skips_free=True, sources=_TRTLLM),
        Runner("flashinfer_trtllm_routed", skips_free=True, sources=_TRTLLM),
        Runner("flashinfer_mxfp4", skips_free=True, sources=(*_CUTLASS, *_TRTLLM)),
        Runner(
            "flashinfer_cutedsl",
            skips_free=True,
            takes_repeats=True,
            sources=(
                Source("flashinfer/data/csrc/moe_utils_binding.cu", "mPtrTopKIds ="),
                Source(_ROUTING, "isLocalExpert ? atomicAdd"),
                Source(
                    "flashinfer/data/csrc/nv_internal/tensorrt_llm/kernels/cuteDslKernels/"
                    "moeUtils.cu",
                    "if (permuted_idx < 0)",
                ),
            ),
        ),
        Runner(
            "humming",
            skips_free=True,
            takes_repeats=True,
            sources=(
                Source(f"{_LAYERS}/moe/moe_runner/humming.py", "ignore_invalid_expert=True"),
                Source(f"{_JIT}/moe/moe_permute_prepare.cu", "independently of EP"),
                Source(f"{_OPS}/moe_fused_mul_sum.py", "expert_mask = id_val >= 0"),
            ),
        ),
        Runner(
            "gguf",
            skips_free=True,
            takes_repeats=True,
            sources=(
                Source(
                    "sglang/kernels/jit/include/sgl_kernel/quantization/gguf/moe_vec.cuh",
                    "if (expert < 0)",
                ),
                Source(f"{_LAYERS}/quantization/gguf.py", "pad_expert_ids=_is_cuda"),
                Source(f"{_OPS}/gguf_moe_weights.py", "active = tl.load(expert_ids"),
            ),
        ),
        Runner(environment.PLATFORM, skips_free=True, takes_repeats=True),
        Runner("triton_kernel", refused="it routes inside its kernel"),
        Runner(
            "cpu",
            refused="SGLang's own experts for CPUs take neither -1 nor an expert twice",
            sources=(Source(f"{_LAYERS}/moe/fused_moe_native.py", "cnts.scatter_(1,"),),
        ),
        Runner("flashinfer_megamoe", refused="rows are sharded before the routing is applied"),
        Runner("hpc_ops", refused="its package `hpc` was not read"),
        Runner("ascend", refused=_PLATFORM),
        Runner("aiter", refused=_PLATFORM),
        Runner("intel_xpu", refused=_PLATFORM),
        Runner("lora_cutedsl", refused=_LORA),
        Runner("lora_triton", refused=_LORA),
        Runner("lora_marlin", refused=_LORA),
        Runner("experimental_sgl_trtllm", refused=_LORA),
        Runner("experimental_sgl_marlin", refused=_LORA),
    )
}
"""By name, in the newest release. Each `MoeRunnerBackend` of SGLang has its entry, but ``auto``."""

OLDER: Mapping[str, tuple[Runner, ...]] = {
    "0.5.22": (
        Runner(
            "triton",
            takes_repeats=True,
            sources=(
                Source(
                    f"{_OPS}/fused_moe_triton_kernels.py", "filter_expert and off_experts == -1"
                ),
                Source(
                    f"{_LAYERS}/moe/moe_runner/triton.py",
                    "self.config.num_experts != self.config.num_local_experts",
                ),
                Source(f"{_JIT}/moe/moe_align_kernel.cu", "expert_id = topk_ids[i] + 1"),
            ),
        ),
        *(
            Runner(name, refused="it was not read in SGLang 0.5.22")
            for name in ("marlin", "cutlass", "cutlass_w4a8", "humming", "gguf")
        ),
    )
}
"""Those that are others in an older release: there, Triton's kernels skip -1 under expert
parallelism only."""

RUNNERS = {**NEWEST, **{runner.name: runner for runner in OLDER.get(signatures.installed(), ())}}
"""By name, in the installed release."""

EXPERTS: Mapping[str, str] = {
    "UnquantizedFusedMoEMethod": "",
    "Fp8MoEMethod": "",
    "ModelOptFp8MoEMethod": "",
    "ModelOptNvFp4FusedMoEMethod": "",
    "ModelOptNvFp4OnlineFusedMoEMethod": "",
    "Mxfp4MoEMethod": "",
    "Mxfp4FlashinferCutlassMoEMethod": "",
    "Mxfp4FlashinferTrtllmMoEMethod": "",
    "Mxfp4MarlinMoEMethod": "",
    "Mxfp4HummingMoEMethod": "",
    "HummingMoEMethod": "",
    "BlockInt8MoEMethod": "",
    "W8A8FP8MoEMethod": "",
    "W8A8Int8MoEMethod": "",
    "MoeWNA16Method": "",
    "AWQMoEScheme": "",
    "GPTQMarlinMoEScheme": "",
    "CompressedTensorsW8A8Fp8MoE": "",
    "CompressedTensorsW4A16Nvfp4MoE": "",
    "CompressedTensorsW4A4Nvfp4MoE": "",
    "MiniMaxM3Nvfp4MoE": "",
    "CompressedTensorsWNA16MoE": "",
    "CompressedTensorsWNA16TritonMoE": "",
    "QuarkW8A8FP8MoE": "",
    "BitsAndBytesMoEMethod": "triton",
    "GGUFMoEMethod": "gguf",
    "W4AFp8MoEMethod": "cutlass_w4a8",
    "CompressedTensorsW4AFP8MoE": "cutlass_w4a8",
}
"""SGLang's quantisation methods and schemes that were read, with the runner that those call which
name none."""

_DELEGATES = (
    "AWQMoEMethod",
    "GPTQMarlinMoEMethod",
    "CompressedTensorsFusedMoEMethod",
    "QuarkFusedMoEMethod",
)
"""Methods that leave everything to the layer's scheme."""


def free_slots(experts: FusedMoE, where: str) -> FreeSlots:
    """What stands in the free slots of a loaded layer's rows.

    Raises:
        EngineError: the layer's runner takes nothing there, or was not read.
    """
    _refuse_unread(experts, where)
    runner = _find(experts, where)
    mapping = _mapping_flags(experts)
    if not mapping:
        return FreeSlots.IGNORED if runner.skips_free else FreeSlots.REPEAT_FIRST
    if not runner.takes_repeats:
        raise EngineError(
            f"{where}: expert ids are mapped after the routing, and MoE runner {runner.name} takes "
            f"no expert twice; unset {mapping}, or add --moe-runner-backend triton"
        )
    return FreeSlots.REPEAT_FIRST


def _refuse_unread(experts: FusedMoE, where: str) -> None:
    unread = "" if _name(_method(experts)) in EXPERTS else _name(_method(experts))
    if type(experts).run_moe_core is not FusedMoE.run_moe_core:
        unread = _name(experts)
    if unread:
        raise EngineError(
            f"{where}: experts that {unread} runs were never read with routing policies in mind; "
            f"serve a checkpoint in another format, or unset {environment.CONFIG}"
        )


def _find(experts: FusedMoE, where: str) -> Runner:
    name, requested = runner_name(experts), get_moe_runner_backend().value
    runner = RUNNERS.get(name, Runner(name, refused="it was not read"))
    if requested in RUNNERS and RUNNERS[requested].refused == _LORA:  # wraps the layers later
        runner = RUNNERS[requested]
    problem, is_fp4 = runner.refused, "fp4" in _name(_method(experts)).lower()
    if is_fp4 and _reads_every_id(experts, name):
        problem = "its kernel for few rows reads every id and the one for many takes no repeats"
    if problem:
        remedy = "marlin" if is_fp4 else "triton"
        raise EngineError(
            f"{where}: MoE runner {runner.name}: {problem}; add --moe-runner-backend {remedy}"
        )
    return runner


def runner_name(experts: FusedMoE) -> str:
    """The runner that a loaded layer uses, whatever was asked for on the command line."""
    if getattr(experts, RUNNER, None) is not None:
        return environment.PLATFORM
    if os.environ.get("SGLANG_PLATFORM") == environment.PLATFORM:
        return "cpu"
    for part in ("fused_func", "runner_core"):
        found = getattr(experts.runner, part, None)
        if found is not None and not _is_sglang(found):
            return _name(found)
    direct = EXPERTS.get(_name(_method(experts)))
    return direct or str(getattr(compat.expert_backend(experts), "value", None))


def _method(experts: FusedMoE) -> Any:
    method = experts.quant_method
    return experts.scheme if _name(method) in _DELEGATES else method


def _name(thing: Any) -> str:
    """The name of SGLang's functions and classes; with the module for those of others."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return str(kind.__name__ if _is_sglang(kind) else f"{kind.__module__}.{kind.__qualname__}")


def _is_sglang(thing: Any) -> bool:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return str(kind.__module__).partition(".")[0] == "sglang"


def _mapping_flags(experts: FusedMoE) -> str:
    """Flags that make SGLang map ids after the routing, where -1 would be the last expert."""
    if get_exec().moe.ep_dispatch_algorithm is not None:
        return "--ep-dispatch-algorithm and --init-expert-location"
    if experts.moe_ep_size > 1 and not compat.DISPATCH_KEEPS_FREE:
        return "--ep-size"
    return ""


def _reads_every_id(experts: FusedMoE, name: str) -> bool:
    """SGLang's small-batch kernel for ungated NVFP4 (sm120_nvfp4_moe_mtp_mma.cuh:151)."""
    is_gated = experts.moe_runner_config.is_gated
    return name == "flashinfer_cutlass" and not is_gated and bool(is_sm120())
