"""The start-up checks without a server, for the ``check`` command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config import LoadedConfig, check_policies, check_torch_policies, load_config
from ..engine import hooking, signatures
from ..engine.report import Inspection
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
    _inspect_symbols(result)
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


def _inspect_symbols(result: Inspection) -> None:
    """Another release than the supported ones is compared with the nearest, for whoever ports."""
    result.sglang = signatures.installed()
    release = signatures.nearest_release(result.sglang)
    result.compared_with = release.name
    try:
        signatures.installed_release()
    except RoutingError as error:
        result.findings = signatures.compare(release, release.symbols)
        result.problems.append(str(error))
        return
    from .hooks import entries

    result.findings = hooking.verify(entries(), release)
    if not all(finding.ok for finding in result.findings):
        result.problems.append(f"{hooking.MODIFIED}: see the symbols above. {hooking.remedy()}")


def _inspect_kernels(result: Inspection, loaded: LoadedConfig | None) -> None:
    import torch

    try:
        chosen = choose("cuda" if torch.cuda.is_available() else "cpu")
        result.kernels, result.kernels_reason = chosen.name, chosen.reason
        if chosen.is_native and loaded is not None:
            result.warnings += check_torch_policies(loaded)
    except RoutingError as error:
        result.problems.append(str(error))


def _platform() -> str:
    from sglang.srt.platforms import current_platform

    return f"{type(current_platform).__name__} ({current_platform.device_name})"
