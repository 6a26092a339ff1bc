"""The start-up checks without a server, for the ``check`` command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import LoadedConfig, check_policies, check_torch_policies, load_config
from ..engine import hooking
from ..engine.report import Finding, Inspection
from ..errors import RoutingError
from ..kernels import choose
from ..policies import Sizes
from ..runtime.similarity import idle_thresholds, load_similarities


def inspect(config: Path, model: Mapping[int, Sizes] | None = None) -> Inspection:
    """Run every check that needs no loaded model and no server flags.

    Args:
        model: MoE layers by layer id, to hold the policies to.
    """
    result = Inspection(config=str(config))
    try:
        result.sglang = hooking.check_version()
        result.findings = _verify_symbols()
        hooking.refuse_problems(result.findings)
    except RoutingError as error:
        result.problems.append(str(error))
    loaded = None
    try:
        loaded = load_config(config)
        result.policies = loaded.config.names
        result.warnings += idle_thresholds(loaded, load_similarities(loaded))
        if model is not None:
            result.warnings += check_policies(loaded, model)
    except RoutingError as error:
        result.problems.append(str(error))
    result.platform = _platform()
    _inspect_kernels(result, loaded)
    return result


def _inspect_kernels(result: Inspection, loaded: LoadedConfig | None) -> None:
    import torch

    try:
        chosen = choose("cuda" if torch.cuda.is_available() else "cpu")
        result.kernels, result.kernels_reason = chosen.name, chosen.reason
        if chosen.is_native and loaded is not None:
            result.warnings += check_torch_policies(loaded)
    except RoutingError as error:
        result.problems.append(str(error))


def _verify_symbols() -> Sequence[Finding]:
    from ..cpu.hooks import HOOKS as CPU_HOOKS
    from .hooks import FORCING_HOOKS, HOOKS, RELIED_ON

    return hooking.verify([*HOOKS, *FORCING_HOOKS, *CPU_HOOKS, *RELIED_ON])


def _platform() -> str:
    from sglang.srt.platforms import current_platform

    return f"{type(current_platform).__name__} ({current_platform.device_name})"
