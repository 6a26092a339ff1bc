"""Load the config and attach the hooks: what `plugin.register` does once it is asked to."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal

from .. import environment, runtime
from ..config import LoadedConfig, load_config
from ..cpu.experts import read_choice
from ..cpu.hooks import HOOKS as CPU_HOOKS
from ..engine import hooking, signatures
from ..engine.fatal import fatal
from ..engine.hooking import Hook
from ..errors import EngineError
from .hooks import FORCING_HOOKS, HOOKS, RELIED_ON, http


def install() -> None:
    """Check sglang, read the config and its artifacts, register every hook of this process.

    Raises:
        RoutingError: anything that keeps this process from serving the configured policies.
    """
    release = signatures.installed_release()
    hooks: list[Hook] = []
    if os.environ.get("SGLANG_PLATFORM") == environment.PLATFORM:
        read_choice()
        hooks += CPU_HOOKS
    if os.environ.get(environment.CONFIG):
        hooks += _start_routing()
        if os.environ.get(environment.FORCE) == "1":
            hooks += FORCING_HOOKS
    hooking.refuse_problems(hooking.verify([*hooks, *RELIED_ON], release))
    if os.environ.get(environment.CONFIG):
        _refuse_other_platforms()
    hooking.apply(hooks, on_failure=fatal)


def _start_routing() -> list[Hook]:
    """Start this process's runtime; the hooks that it needs."""
    loaded = load_config(os.environ[environment.CONFIG])
    is_main = _is_main()
    if is_main:
        os.environ[environment.CONFIG] = str(loaded.path)
        os.environ[environment.RELOAD_TOKEN] = str(secrets.randbits(62))
    else:
        _check_unchanged(loaded)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main one ends us
    runtime.start(loaded)
    return [hook for hook in HOOKS if is_main or hook not in http.HOOKS]


def _refuse_other_platforms() -> None:
    """Raise `EngineError` but on NVIDIA GPUs and the portable CPU platform: elsewhere, other
    packages' too, other routers and kernels run."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.cuda import CudaSRTPlatform

    from ..cpu.platform import PortableCpuPlatform

    found = type(current_platform)
    if found not in (CudaSRTPlatform, PortableCpuPlatform):
        selected = os.environ.get("SGLANG_PLATFORM")
        raise EngineError(
            f"SGLang runs on the platform {found.__module__}.{found.__qualname__} "
            f"(SGLANG_PLATFORM={selected or ''}), where routing policies are not supported; unset "
            f"SGLANG_PLATFORM on a machine with an NVIDIA GPU, or set it to {environment.PLATFORM}"
        )


def _is_main() -> bool:
    """Whether this process starts an engine; the engine's processes inherit the digest."""
    return multiprocessing.parent_process() is None or environment.CONFIG_SHA256 not in os.environ


def _check_unchanged(loaded: LoadedConfig) -> None:
    expected = os.environ[environment.CONFIG_SHA256]
    if loaded.sha256 != expected:
        raise EngineError(
            f"{loaded.path} changed while the server was starting "
            f"(sha256 {loaded.sha256[:12]}, expected {expected[:12]}); start it again"
        )
