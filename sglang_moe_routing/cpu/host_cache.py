"""KV between the device pools and SGLang's host caches, where both lie in the same memory.

SGLang imports its transfer kernels on accelerators only; on other devices the names are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

IO_BACKEND = "direct"
MEM_LAYOUT = "layer_first"


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy rows of each source to rows of the destination at the same place.

    Args:
        src_layers, dst_layers: ``[num_rows, ...]`` each, equal but for the number of rows.
        src_indices, dst_indices: int64 ``[num_copied]``.
        page_size: rows of a page; pages need no care here.
    """
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]


def register() -> None:
    """Give SGLang's host pools the transfer that `IO_BACKEND` with `MEM_LAYOUT` asks for.

    They must not pin memory either, whatever they are asked: there is no driver to pin it.
    """
    from sglang.srt.mem_cache.pool_host import mha, mla
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    HostKVCache.pin_memory = property(lambda self: False, lambda self, value: None)

    for module in (mha, mla):
        module.transfer_kv_direct = transfer_kv_direct
