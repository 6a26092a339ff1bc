"""Send re-routing calls to ``route_driver.cu``: CUDA kernels on the simulator, or the CPU code."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_moe_routing.policies import FreeSlots, PolicyTable
from tests.kernels import building

HERE = Path(__file__).parent
BACKENDS = ("cuda", "avx512", "avx2", "portable")
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "given")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NUM_STATISTICS = 6

GAP = 0xEE
"""What every byte between the rows of an output holds before a call."""


@dataclass(frozen=True)
class Outcome:
    """What a call left: outputs, statistics, and how many grids were launched."""

    topk_ids: Tensor
    topk_weights: Tensor
    union: Tensor
    statistics: list[int]
    num_launches: int


class Driver:
    """A running driver program. A crash or a sanitizer's report fails the call that caused it."""

    def __init__(self, program: Path) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        options = {
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
        }
        self._process = subprocess.Popen(
            _command(program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **options},
        )

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(timeout=60)
        self._errors.close()

    def run(
        self,
        scores: Tensor,
        policy_ids: Tensor,
        table: PolicyTable,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        backend: str = "cuda",
        seed: int = 0,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        scoring: str = "softmax",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        free_slots: FreeSlots = FreeSlots.IGNORED,
        counts: bool = True,
        out_gap: int = 0,
        in_place: bool = False,
    ) -> Outcome:
        """One call. Tensors may have any row stride.

        Args:
            counts: whether statistics are asked for.
            out_gap: elements between the rows of the outputs.
            in_place: `topk_ids` and `topk_weights` are the outputs too.

        Raises:
            AssertionError: the driver died, and the message is what it said; or something between
                the rows of the outputs was overwritten.
        """
        num_rows, num_experts = scores.shape
        top_k = topk_ids.shape[1]
        num_policies, num_steps, _ = table.words.shape
        header = struct.pack(
            "=11if13i",
            BACKENDS.index(backend),
            seed,
            num_rows,
            num_experts,
            top_k,
            _TYPES[scores.dtype],
            _stride(scores),
            SCORINGS.index(scoring),
            num_groups,
            top_groups,
            renormalize,
            scale,
            gates is not None,
            bias is not None,
            topk_ids.dtype == torch.int64,
            _stride(topk_ids),
            _TYPES[topk_weights.dtype],
            _stride(topk_weights),
            num_policies,
            num_steps,
            table.similarity.shape[0],
            free_slots,
            counts,
            out_gap,
            in_place,
        )
        parts = [
            header,
            _bytes(scores),
            b"" if gates is None else _bytes(gates.float().contiguous()),
            b"" if bias is None else _bytes(bias[None].float()),
            _bytes(topk_ids),
            _bytes(topk_weights),
            _bytes(policy_ids[None].int()),
            _bytes(table.words.view(1, -1)),
            _bytes(table.similarity.reshape(1, -1)),
        ]
        id_gap = weight_gap = out_gap
        if in_place:
            id_gap, weight_gap = _stride(topk_ids) - top_k, _stride(topk_weights) - top_k
        with self._explained():
            assert self._process.stdin is not None
            self._process.stdin.write(b"".join(parts))
            self._process.stdin.flush()
            return Outcome(
                topk_ids=self._receive_rows(topk_ids.dtype, num_rows, top_k, id_gap),
                topk_weights=self._receive_rows(topk_weights.dtype, num_rows, top_k, weight_gap),
                union=self._receive(torch.bool, (num_experts,)),
                statistics=self._receive(torch.int64, (_NUM_STATISTICS,)).tolist(),
                num_launches=int(self._receive(torch.int64, (1,)).item()),
            )

    def _receive_rows(self, dtype: torch.dtype, rows: int, columns: int, gap: int) -> Tensor:
        """A matrix whose rows lie apart. Nobody but the driver may have written between them."""
        extent = max(rows * (columns + gap) - gap, 0)
        matrix = self._receive(dtype, (extent,)).as_strided((rows, columns), (columns + gap, 1))
        assert_gaps_untouched(matrix)
        return matrix.contiguous()

    def _receive(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        empty = torch.empty(tuple(shape), dtype=dtype)
        size = empty.numel() * empty.element_size()
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        if size == 0:
            return empty
        return torch.frombuffer(bytearray(data), dtype=dtype).view(tuple(shape))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, BrokenPipeError):
            status = self._process.wait(timeout=60)
            self._errors.seek(0)
            raise AssertionError(f"status {status}: {self._errors.read()[:4000]}") from None


def build_driver(
    flavour: building.Flavour, *, csrc: Path = building.CSRC, has_cpu: bool = True
) -> Path:
    """The driver program in one of the simulator's three builds. Raises `building.BuildError`.

    Args:
        csrc: a changed copy of csrc.
        has_cpu: without the CPU backends the program builds in a fraction of the time.
    """
    return building.build(
        [
            HERE / "route_driver.cu",
            *(sorted((csrc / "cpu").glob("route_*.cpp")) if has_cpu else ()),
        ],
        flavour,
        defines=() if has_cpu else ["ROUTE_DRIVER_NO_CPU"],
        include=[csrc / "include"],
        csrc=csrc,
    )


def _command(program: Path) -> list[str]:
    """How to start the program: TSan's may need an address space that is not randomised."""
    done = subprocess.run(
        [str(program)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        return ["setarch", platform.machine(), "-R", str(program)]
    return [str(program)]


def apart(matrix: Tensor, gap: int) -> Tensor:
    """A copy with `gap` elements between its rows."""
    num_rows, num_columns = matrix.shape
    size = num_rows * (num_columns + gap) * matrix.element_size()
    flat = torch.full((size,), GAP, dtype=torch.uint8).view(matrix.dtype)
    copy = flat.view(num_rows, num_columns + gap)[:, :num_columns]
    return copy.copy_(matrix)


def assert_gaps_untouched(matrix: Tensor) -> None:
    """Nobody has written between the rows of a copy that `apart` made."""
    num_rows, num_columns = matrix.shape
    gap = _stride(matrix) - num_columns
    if gap <= 0 or num_rows < 2:
        return
    start = matrix.storage_offset() + num_columns
    between = matrix.as_strided((num_rows - 1, gap), matrix.stride(), start).contiguous()
    assert (between.view(torch.uint8) == GAP).all(), "written between the rows"


def _stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _bytes(matrix: Tensor) -> bytes:
    """The memory from a matrix's first to its last element, gaps between rows included."""
    num_rows, num_columns = matrix.shape
    if matrix.numel() == 0:
        return b""
    assert matrix.stride(1) == 1 or num_columns == 1
    extent = (num_rows - 1) * _stride(matrix) + num_columns
    flat: Any = matrix.as_strided((extent,), (1,))
    return np.asarray(flat.view(torch.uint8)).tobytes()
