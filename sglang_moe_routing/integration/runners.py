"""SGLang's MoE runners: which ids each takes in the slots that hold no expert.

Final rows hold distinct experts, so that slots are left over. What stands in them is chosen here
for every layer when the model is loaded, by the table in ``runners.yaml``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
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
class Runner:
    """What runs the experts of a layer.

    Attributes:
        name: its value of ``--moe-runner-backend``; a name of ours where a kind of experts calls
            its kernels by itself.
        skips_free: whether a slot with id -1 loads no expert and adds nothing.
        takes_repeats: whether a row may name an expert in several slots.
        refused: why no layer may run on it; empty where layers may.
        wraps: whether it is put around the layers later, when they were judged.
        evidence: what shows the first two: parts of lines, by file below site-packages.
    """

    name: str
    skips_free: bool = False
    takes_repeats: bool = False
    refused: str = ""
    wraps: bool = False
    evidence: Mapping[str, str | list[str]] = field(default_factory=dict)


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NEWEST = {name: Runner(name, **row) for name, row in _TABLE["newest"].items()}
OLDER = {
    release: {name: Runner(name, **row) for name, row in others.items()}
    for release, others in _TABLE["older"].items()
}
RUNNERS = {**NEWEST, **OLDER.get(signatures.installed(), {})}
"""By name, in the installed release."""

EXPERTS: Mapping[str, str] = {
    method: "" if runner == "any" else runner
    for runner, methods in _TABLE["experts"].items()
    for method in methods
}
"""Quantisation methods and schemes that were read, with the runner that those call which name
none."""


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
    if requested in RUNNERS and RUNNERS[requested].wraps:
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
    return experts.scheme if _name(method) in _TABLE["delegates"] else method


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
