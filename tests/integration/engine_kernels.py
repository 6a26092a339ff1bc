"""SGLang's own MoE kernels on given rows, in Triton's interpreter.

A program for test_engine_kernels.py, because Triton decides at import whether it interprets:
``python -m tests.integration.engine_kernels CALLS RESULTS``, both files of `torch.save`.

Where SGLang has GPU code only, something else stands in: for the matrix products of DeepGEMM a
plain loop; for the block alignment in C++ (``sgl_kernel.moe_align_block_size``) SGLang's Triton
one for few slots, which keeps the same contract and is right for many; for DeepGEMM's last kernel,
which the interpreter cannot run, its sibling `moe_unpermute`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from sglang.kernels.ops.moe.ep_moe_kernels import (
    fused_moe_dispatch_index,
    moe_ep_deepgemm_preprocess,
    moe_unpermute,
)
from sglang.kernels.ops.moe.moe_align_small_numel import SMALL_NUMEL_LIMIT, moe_align_small_numel
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import _fused_moe_kernel_sequence
from sglang.srt.runtime_context import get_context
from torch import Tensor
from torch.nn import functional

BLOCK = 16
CONFIG = {"BLOCK_SIZE_M": BLOCK, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 1}


def align(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(sorted_token_ids, expert_ids, num_tokens_post_padded)`` of blocks of `BLOCK` slots."""
    num_blocks = min(ids.numel(), ids.numel() // BLOCK + num_experts + 1)
    slots = torch.empty(num_blocks * BLOCK, dtype=torch.int32)
    experts = torch.empty(num_blocks, dtype=torch.int32)
    total = torch.empty(1, dtype=torch.int32)
    moe_align_small_numel(ids, num_experts + 1, BLOCK, slots, experts, total)
    return slots[: int(total)], experts[: int(total) // BLOCK], total


def triton(call: dict[str, Any]) -> Tensor:
    """The Triton runner: both products, activation and sum. Without expert parallelism, as here,
    it is called with ``filter_expert=False``."""
    ids, w13, w2 = call["triton_ids"], call["w13"], call["w2"]
    scales = {f"{name}_scale": None for name in ("w1", "w2", "a1", "a2")}
    points = {"w1_zp": None, "w2_zp": None, "b1": None, "b2": None, "block_shape": None}
    limits = {"routed_scaling_factor": None, "gemm1_alpha": None, "gemm1_limit": None}
    kinds = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16")
    return _fused_moe_kernel_sequence(
        call["x"].clone(),
        w13,
        w2,
        call["weights"],
        ids,
        *align(ids, w13.shape[0]),
        CONFIG,
        None,
        False,
        False,
        activation="silu",
        is_gated=True,
        inplace=True,
        no_combine=False,
        apply_router_weight_on_input=False,
        filter_expert=False,
        per_channel_quant=False,
        **{f"use_{kind}": False for kind in kinds},
        **scales,
        **points,
        **limits,
    )


def deep_gemm(call: dict[str, Any]) -> Tensor:
    """The masked layout of the DeepGEMM runner: one region of rows per expert."""
    x, ids, w13, w2 = call["x"], call["ids"], call["w13"], call["w2"]
    counts, _, places, regions, _ = moe_ep_deepgemm_preprocess(
        ids, w13.shape[0], x, ids.shape[1], [128, 128], output_dtype=x.dtype
    )
    results = torch.zeros_like(regions)
    for expert, count in enumerate(counts.tolist()):
        results[expert, :count] = run_expert(regions[expert, :count], w13[expert], w2[expert])
    return moe_unpermute(results.flatten(0, 1), places, ids, call["weights"])


def run_expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = functional.linear(x, w13).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, w2)


def run(call: dict[str, Any]) -> dict[str, Any]:
    ids, num_experts = call["ids"], call["num_experts"]
    num_places = (ids.shape[0] // 256 + 1) * 256  # of an expert, as SGLang computes it
    counts, places = fused_moe_dispatch_index(ids, num_experts, num_places)
    result = {"counts": counts, "places": places.view_as(ids), "num_places": num_places}
    if ids.numel() <= SMALL_NUMEL_LIMIT:
        slots, experts, _ = align(ids, num_experts)
        result |= {"slots": slots.view(-1, BLOCK), "experts": experts}
    if "x" in call:
        result |= {"triton": triton(call), "deep_gemm": deep_gemm(call)}
    return result


if __name__ == "__main__":
    with get_context().override_server_args():  # the kernels' launchers read it
        calls = torch.load(sys.argv[1])
        torch.save({name: run(call) for name, call in calls.items()}, sys.argv[2])
