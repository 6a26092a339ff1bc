"""Matrix products of the portable CPU platform that do not depend on the batch.

torch's products add in an order that depends on the number of rows, so that a request's text would
depend on its neighbours although its routing does not. SGLang replaces the same operators on GPUs
for deterministic inference.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import compiled_experts

_replacements: list[torch.library.Library] = []


def register() -> None:
    """Replace ``aten::mm`` and ``aten::addmm`` on CPU tensors in this process, once."""
    if _replacements:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is meant here
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    _replacements.append(library)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; row-invariant where `b` is the transpose of a weight matrix."""
    if not _is_linear(a, b):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return compiled_experts.linear(a, b.T)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``, likewise."""
    if not _is_linear(a, b) or alpha != 1:
        out = a.new_empty(a.shape[0], b.shape[1])
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out)
    return compiled_experts.linear(a, b.T) + (bias if beta == 1 else beta * bias)


def _is_linear(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype in compiled_experts.DTYPES
        and a.dtype == b.dtype
        and a.stride(1) == 1
        and b.stride(0) == 1
        and min(a.shape[1], b.shape[1]) > 0
    )
