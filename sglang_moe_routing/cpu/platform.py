"""The platform class (SGLang's `SRTPlatform`), selected with SGLANG_PLATFORM=moe_routing_cpu."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from .. import environment
from . import host_cache

DEFAULT_KV_TOKENS = 65_536
"""KV pool where the operator sets none; SGLang would otherwise take 72 % of all memory."""


def allocate_unpinned(
    dims: tuple[int, ...], dtype: torch.dtype, device: str, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Host memory as SGLang's host caches ask for it, without pinning it for a GPU."""
    return torch.empty(dims, dtype=dtype, device=device)


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # sglang is untyped
    """CPU with plain torch operators, on any architecture."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities(
        graph_capture=os.environ.get(environment.EMULATE_GRAPHS) == "1"
    )

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"  # SGLang splits it like the --device flag: a torch.device would fail

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"  # "cpu" would choose operators that need AMX kernels

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def apply_server_args_defaults(self, server_args: Any) -> None:
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_KV_TOKENS
        server_args.disable_custom_all_reduce = True
        server_args.hicache_io_backend = host_cache.IO_BACKEND
        server_args.hicache_mem_layout = host_cache.MEM_LAYOUT
        server_args.sleep_on_idle = True  # an idle scheduler would take a core from the others
        if self.capabilities.graph_capture:
            return  # "intel_amx" falls back to torch_native later, where graphs stay allowed
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        graphs = server_args.cuda_graph_config
        for phase in (Phase.DECODE, Phase.PREFILL):
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
        server_args.cuda_graph_config = graphs

    def init_backend(self) -> None:
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

        from . import attention, moe

        moe.register()
        attention.register()
        host_cache.register()
        ALLOC_MEMORY_FUNCS["cpu"] = allocate_unpinned

    def get_graph_runner_cls(self) -> type | None:
        if not self.capabilities.graph_capture:
            return None
        from .emulated_graphs import EmulatedDecodeGraphRunner

        return EmulatedDecodeGraphRunner

    def get_full_graph_backend_cls(self) -> type[Any]:
        from .emulated_graphs import EmulatedGraphBackend

        return EmulatedGraphBackend
