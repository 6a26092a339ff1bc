"""Find, build and load the compiled kernels.

The wheel carries sources. They are compiled on first use, or ahead of time by ``sglang-moe-routing
build``, into one cache folder whose subfolders are named after everything that went into them, so
that no stale binary is ever picked up. Without a compiler the torch reference serves; a build that
fails is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ..errors import KernelError

CHOICE = "SGLANG_MOE_ROUTING_KERNELS"
"""``auto`` (default): compiled kernels where they exist or can be built, else the torch reference;
``native``: compiled kernels or an error; ``torch``: the reference."""

CACHE = "SGLANG_MOE_ROUTING_CACHE"
"""Folder of compiled kernels; ``sglang-moe-routing`` in the user's cache folder if unset."""

INSTRUCTION_SET = "SGLANG_MOE_ROUTING_CPU_ISA"
"""``amx``, ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``; the fastest that the processor
has if unset."""

TARGET_ARCHITECTURES = ("8.0", "8.9", "9.0", "10.0", "12.0")
"""CUDA compute capabilities that the kernels are written for."""

REFERENCE = "torch reference"

Backend = Literal["cpu", "cuda"]

_CPU_FLAGS = ("-O3", "-fopenmp")
_HOST_FLAGS = ("-O3", "-fopenmp-simd")  # of the C++ beside CUDA kernels
_CUDA_FLAGS = ("-O3",)
_READY = "ready.json"  # written last: other processes must not load a half-linked file
_LOCK = "build.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """What runs the re-routing on one kind of device.

    Attributes:
        name: such as ``cuda``, ``cpu avx512`` or ``torch reference``.
        reason: why this one.
        module: the compiled functions; None for the reference.
    """

    name: str
    reason: str
    module: Any = None

    @property
    def is_native(self) -> bool:
        return self.module is not None


@cache
def choose(backend: Backend) -> Implementation:
    """The implementation for a device type. Compiles it if need be: not inside a forward.

    Raises:
        KernelError: the build fails, or ``native`` is asked for and cannot be had.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in ("auto", "native", "torch"):
        raise KernelError(f"{CHOICE}={choice!r} is not one of auto, native, torch")
    if choice == "torch":
        return Implementation(REFERENCE, f"{CHOICE}=torch")
    architectures = (_device_architecture(),) if backend == "cuda" else ()
    folder = _find_built(backend, architectures)
    reason = f"compiled in {folder}"
    if folder is None:
        missing = _missing_tools(backend)
        if missing and choice == "native":
            raise KernelError(f"{CHOICE}=native, but {missing}")
        if missing:
            logger.warning("the torch reference does the re-routing: %s", missing)
            return Implementation(REFERENCE, missing)
        folder, reason = _build_or_find_other(backend, architectures)
    module = _load(folder, backend)
    return Implementation(_describe(backend, module), reason, module)


def _build_or_find_other(backend: Backend, architectures: Sequence[str]) -> tuple[Path, str]:
    """Compile; where that fails, take what other tools have compiled. The folder, and why it.

    Raises:
        KernelError: neither can be had.
    """
    try:
        folder = _build(backend, architectures)
    except KernelError as error:
        other = _find_built(backend, architectures, of_any_tools=True)
        if other is None:
            raise
        logger.warning("the %s kernels are those of other tools in %s: %s", backend, other, error)
        return other, f"compiled by other tools in {other}"
    return folder, f"compiled now in {folder}"


def build_cpu() -> Path:
    """Compile the CPU kernels unless done before. Returns their folder. Raises `KernelError`."""
    return _find_built("cpu", ()) or _build("cpu", ())


def build_cuda(architectures: Sequence[str]) -> Path:
    """Compile the CUDA kernels for compute capabilities such as ``9.0``; needs no GPU.

    Returns:
        Their folder. Raises `KernelError`.
    """
    for architecture in architectures:
        major, dot, minor = architecture.partition(".")
        if not (major.isdecimal() and dot and minor.isdecimal()):
            raise KernelError(f"architecture {architecture!r}: expected one such as 9.0")
    wanted = tuple(sorted(architectures, key=_numbers))
    return _find_built("cuda", wanted) or _build("cuda", wanted)


def sources() -> Path:
    """The folder ``csrc``, in a checkout or in an installed package. Raises `KernelError`."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "include").is_dir():
            return folder
    raise KernelError("this installation has no kernel sources (csrc)")


def cache_folder() -> Path:
    """Where compiled kernels lie."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sglang-moe-routing"


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH, or /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return _require_toolkit(Path(os.environ[name]), name)
    nvcc = shutil.which("nvcc")
    guesses = [Path("/usr/local/cuda")]
    if nvcc:
        guesses.insert(0, Path(nvcc).resolve().parents[1])
    return next((home for home in guesses if _is_toolkit(home)), None)


def _require_toolkit(home: Path, name: str) -> Path:
    if not _is_toolkit(home):
        raise KernelError(f"{name}={home} holds no CUDA toolkit (bin/nvcc, include/cuda_runtime.h)")
    return home


def _is_toolkit(home: Path) -> bool:
    return (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists()


def _missing_tools(backend: Backend) -> str:
    """What keeps us from compiling; empty if nothing does."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} on PATH"
    if backend == "cuda" and cuda_home() is None:
        return "no CUDA toolkit (CUDA_HOME is not set, no nvcc on PATH)"
    return ""


def _numbers(architecture: str) -> tuple[int, ...]:
    return tuple(int(number) for number in architecture.split("."))


def _device_architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _runs_on(built: str, device: str) -> bool:
    """A cubin runs on its own compute capability and later ones of the same major version."""
    return _numbers(built)[0] == _numbers(device)[0] and _numbers(built) <= _numbers(device)


def _sources(backend: Backend) -> list[Path]:
    """What is compiled."""
    return sorted((sources() / backend).glob("*.cu" if backend == "cuda" else "*.cpp"))


def _fingerprint(backend: Backend) -> str:
    """Digest of what goes into a binary, but for tools and CUDA architectures."""
    digest = hashlib.sha256()
    folder = sources()
    for path in sorted(p for room in ("include", backend) for p in (folder / room).rglob("*.*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    flags = (*_host_flags(backend), *_CUDA_FLAGS)
    described = (flags, version("apache-tvm-ffi"), platform.machine())
    digest.update(repr(described).encode())
    return digest.hexdigest()[:16]


def _tools(backend: Backend) -> Mapping[str, str] | None:
    """What this machine compiles with, by version; None where it cannot compile.

    A binary of other tools may need another libcudart or C++ runtime than is here. Without tools,
    as in a slim image, or where they fail, it is still the best there is.
    """
    try:
        if _missing_tools(backend):
            return None
    except KernelError:  # CUDA_HOME is set, as images do, and holds no toolkit
        return None
    commands = {"c++": os.environ.get("CXX", "c++")}
    if backend == "cuda":
        commands["nvcc"] = str(cuda_home()) + "/bin/nvcc"
    return {name: _version(command) for name, command in commands.items()}


def _version(command: str) -> str:
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.removeprefix(Path(command).name)  # GCC says how it was called


@dataclass(frozen=True)
class _Mark:
    """What ``ready.json`` says about the binary beside it."""

    architectures: tuple[str, ...]
    sha256: str
    tools: Mapping[str, str]


def _read_mark(folder: Path) -> _Mark | None:
    """None where there is none, or one that an interrupted machine has left."""
    try:
        content = json.loads((folder / _READY).read_bytes())
        mark = _Mark(tuple(content["architectures"]), content["sha256"], dict(content["tools"]))
        for architecture in mark.architectures:
            _numbers(architecture)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return mark


def _intact(folder: Path, backend: Backend) -> _Mark | None:
    """The mark of a binary that is what was built; None if it is damaged or not finished."""
    mark = _read_mark(folder)
    return mark if mark is not None and mark.sha256 == _digest(folder, backend) else None


def _find_built(
    backend: Backend, wanted: Sequence[str], *, of_any_tools: bool = False
) -> Path | None:
    """A folder with an intact binary, of this machine's tools, for every wanted architecture."""
    tools = None if of_any_tools else _tools(backend)
    for ready in sorted(cache_folder().glob(f"{backend}-{_fingerprint(backend)}-*/{_READY}")):
        mark = _intact(ready.parent, backend)
        if mark is None:
            logger.warning("the %s kernels in %s are damaged or gone", backend, ready.parent)
            continue
        is_usable = tools is None or mark.tools == tools
        if is_usable and all(any(_runs_on(b, w) for b in mark.architectures) for w in wanted):
            return ready.parent
    return None


def _digest(folder: Path, backend: Backend) -> str:
    """SHA-256 of the binary, empty if there is none: a damaged one would end the process."""
    try:
        return hashlib.sha256((folder / _library_file(backend)).read_bytes()).hexdigest()
    except OSError:
        return ""


def _build(backend: Backend, architectures: Sequence[str]) -> Path:
    missing, tools = _missing_tools(backend), _tools(backend)
    if missing or tools is None:
        raise KernelError(f"cannot compile the {backend} kernels: {missing}")
    folder = _folder(backend, architectures, tools)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if _intact(folder, backend) is None:  # else another process was faster
                logger.warning("compiling the %s kernels into %s (once)", backend, folder)
                _clear(folder)
                _compile(backend, architectures, folder)
                _mark_ready(folder, backend, architectures, tools)
    except (RuntimeError, OSError) as error:
        raise KernelError(
            f"compiling the {backend} kernels in {folder} failed ({CACHE} chooses another folder, "
            f"{CHOICE}=torch does without kernels):\n{error}"
        ) from error
    return folder


def _folder(backend: Backend, architectures: Sequence[str], tools: Mapping[str, str]) -> Path:
    """Where a binary of these tools belongs."""
    toolchain = hashlib.sha256(repr(sorted(tools.items())).encode()).hexdigest()[:8]
    return cache_folder() / "-".join([backend, _fingerprint(backend), toolchain, *architectures])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w") as file:  # closing it lets go
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(folder: Path) -> None:
    """Leave nothing of an interrupted build: a cut object file looks finished to ninja."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _compile(backend: Backend, architectures: Sequence[str], folder: Path) -> None:
    import tvm_ffi.cpp

    with _build_environment(backend, architectures):
        tvm_ffi.cpp.build(
            _library_name(backend),
            sources=[str(path) for path in _sources(backend)],
            extra_cflags=list(_host_flags(backend)),
            extra_cuda_cflags=list(_CUDA_FLAGS),
            extra_ldflags=_link_flags(backend),
            extra_include_paths=[str(sources() / "include"), str(sources())],
            build_directory=str(folder),
            backend="cuda" if backend == "cuda" else None,
        )


def _mark_ready(
    folder: Path, backend: Backend, architectures: Sequence[str], tools: Mapping[str, str]
) -> None:
    """Say that the binary is whole, once it and what says so are on the disk."""
    mark = _Mark(tuple(architectures), _digest(folder, backend), tools)
    unfinished = folder / f"{_READY}.{os.getpid()}"
    unfinished.write_text(json.dumps(asdict(mark)))
    for path in (folder / _library_file(backend), unfinished):
        _flush(path)
    unfinished.replace(folder / _READY)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _build_environment(backend: Backend, architectures: Sequence[str]) -> Iterator[None]:
    """What tvm-ffi reads from the environment, for the time of a build."""
    import ninja

    changes = {"PATH": os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])}
    if backend == "cuda":
        changes["CUDA_HOME"] = str(cuda_home())
        changes["TVM_FFI_CUDA_ARCH_LIST"] = " ".join(architectures)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _host_flags(backend: Backend) -> tuple[str, ...]:
    return _CPU_FLAGS if backend == "cpu" else _HOST_FLAGS


def _link_flags(backend: Backend) -> list[str]:
    """Some toolkits keep the runtime library in lib, where tvm-ffi does not look.

    OpenMP's library is linked by name only: at run time it is the one that torch has loaded.
    """
    return [f"-L{cuda_home()}/lib"] if backend == "cuda" else ["-fopenmp"]


def _library_name(backend: Backend) -> str:
    return f"moe_routing_{backend}"


def _library_file(backend: Backend) -> str:
    return f"{_library_name(backend)}.so"


def _load(folder: Path, backend: Backend) -> Any:
    import tvm_ffi

    path = folder / _library_file(backend)
    try:
        return tvm_ffi.load_module(str(path))
    except (RuntimeError, OSError) as error:
        raise KernelError(f"{path} cannot be loaded: {error}") from error


def _describe(backend: Backend, module: Any) -> str:
    if backend == "cuda":
        return "cuda"
    wanted = os.environ.get(INSTRUCTION_SET)
    available = str(module.instruction_sets()).split()
    if wanted is not None and wanted not in available:
        raise KernelError(f"{INSTRUCTION_SET}={wanted!r} is not one of {', '.join(available)}")
    name = wanted or available[0]
    module.use_instruction_set(name)
    return f"cpu {name}"
