"""Compile C++ programs, most against the simulator in simt/, and run them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Flavour = Literal["plain", "asan", "tsan"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = Path(__file__).resolve().parent
SIMULATOR = KERNELS / "simt" / "simt.cpp"

COMMON_FLAGS = (
    "-std=c++17",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # nvcc's, such as unroll
    "-fno-strict-aliasing",  # kernels load several numbers at a time through wider types
)
ASAN_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
PROGRAM_FLAGS: dict[Flavour, tuple[str, ...]] = {
    "plain": ("-O1",),
    "asan": ("-O1", *ASAN_FLAGS),
    "tsan": ("-O1", "-fsanitize=thread", "-DSIMT_TSAN"),
}
SIMULATOR_FLAGS: dict[Flavour, tuple[str, ...]] = {
    "plain": ("-O2",),
    "asan": ("-O2", *ASAN_FLAGS),
    "tsan": ("-O2", "-DSIMT_TSAN"),  # not instrumented: TSan must not see the scheduler
}


class BuildError(Exception):
    """The compiler refused; the message is what it said."""


def cuda_include() -> Path:
    """Folder with CUDA's headers: of a toolkit, or of the wheels that torch brings.

    Looks in $CUDA_HOME, /usr/local/cuda and site-packages/nvidia/cu13, in this order.

    Raises:
        FileNotFoundError: if cuda_bf16.h is in none of them.
    """
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    homes = [Path("/usr/local/cuda"), wheel]
    if os.environ.get("CUDA_HOME"):
        homes.insert(0, Path(os.environ["CUDA_HOME"]))
    for home in homes:
        if (home / "include" / "cuda_bf16.h").is_file():
            return home / "include"
    looked_in = ", ".join(str(home / "include") for home in homes)
    raise FileNotFoundError(
        f"no CUDA headers: cuda_bf16.h is not in {looked_in}; "
        "set CUDA_HOME or install nvidia-cuda-runtime and nvidia-cuda-crt"
    )


def why_unavailable() -> str | None:
    """Why nothing can be built here, or None: for skipping tests with their reason."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: {_compiler()} is not on the PATH"
    try:
        cuda_include()
    except FileNotFoundError as error:
        return str(error)
    return None


def build(
    sources: Sequence[Path],
    flavour: Flavour,
    *,
    defines: Sequence[str] = (),
    include: Sequence[Path] = (),
    csrc: Path = CSRC,
) -> Path:
    """Build a program from C++ or CUDA sources and the simulator, unless it is there already.

    Args:
        sources: files with the kernels and a `main`.
        flavour: plain, asan (with UBSan) or tsan.
        defines: macros, as `NAME` or `NAME=VALUE`; the simulator gets those named SIMT_ too.
        include: folders with headers, besides csrc, the simulator's and CUDA's. Their files are no
            part of the cache's key; csrc's and the simulator's are.
        csrc: a changed copy of csrc to take headers from. The simulator itself stays the same.

    Returns:
        The executable, in a folder of the user's among the temporary files.

    Raises:
        BuildError: if a source does not compile without warnings.
    """
    common = [*COMMON_FLAGS, "-isystem", str(cuda_include())]
    simulators = [f"-D{name}" for name in defines if name.startswith("SIMT_")]
    simulator = _simulator(flavour, [*common, *simulators, f"-I{CSRC}", f"-I{KERNELS}"])
    macros = [f"-D{name}" for name in defines]
    folders = [f"-I{folder}" for folder in (csrc, KERNELS, *include)]
    flags = [*common, *macros, *folders, *PROGRAM_FLAGS[flavour]]
    inputs = ["-x", "c++", *map(str, sources), "-x", "none", str(simulator)]
    contents = [*sources, *_files(csrc), *_files(SIMULATOR.parent)]
    return _compile(flags, inputs, contents, f"{sources[0].stem}-{flavour}")


class Source(NamedTuple):
    """A C++ file of a program without the simulator."""

    path: Path
    flags: tuple[str, ...]
    csrc: Path = CSRC
    """Where it takes headers from: a changed copy of csrc for a planted bug."""


def build_program(
    sources: Sequence[Source], link_flags: Sequence[str], name: str, *, compiler: str | None = None
) -> Path:
    """Compile each source to an object, several at a time, and link; keep what is there already.

    Args:
        link_flags: such as -fopenmp.
        name: of the program; for reading the cache's folder only.
        compiler: instead of $CXX or g++.

    Raises:
        BuildError: if a source does not compile without warnings, or symbols are missing.
    """

    def build_object(source: Source) -> Path:
        headers = [*source.csrc.glob("cpu/*.h"), *source.csrc.glob("include/**/*.h")]
        flags = [*source.flags, f"-I{source.csrc}", f"-I{source.csrc / 'include'}"]
        contents = [source.path, *sorted(headers)]
        return _compile(
            flags, ["-c", str(source.path)], contents, f"{source.path.stem}.o", compiler
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(build_object, sources)]
    return _compile(link_flags, objects, [], name, compiler)  # objects are named by their contents


def run(
    program: Path, *args: str, seed: int = 0, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a built program and return how it ended; a failure is not an exception.

    Args:
        seed: 0 for threads and blocks in order, else which random order.
        timeout: seconds until `subprocess.TimeoutExpired`.
    """
    command = [str(program), *args]
    done = _execute(command, seed, timeout)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # TSan cannot place its shadow memory where the kernel randomises addresses widely.
        done = _execute(["setarch", platform.machine(), "-R", *command], seed, timeout)
    return done


def _execute(command: list[str], seed: int, timeout: float) -> subprocess.CompletedProcess[str]:
    options = {
        "SIMT_SEED": str(seed),
        "ASAN_OPTIONS": "detect_leaks=0",  # fibers given up after an error leak what they hold
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",  # nothing else runs by then
    }
    return subprocess.run(
        command,
        env={**os.environ, **options},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def _simulator(flavour: Flavour, flags: Sequence[str]) -> Path:
    """The simulator's object file."""
    inputs = ["-c", str(SIMULATOR)]
    own_flags = [*flags, *SIMULATOR_FLAGS[flavour]]
    contents = [*_files(SIMULATOR.parent), CSRC / "cuda" / "portable.cuh"]
    return _compile(own_flags, inputs, contents, f"simt-{flavour}.o")


def _compile(
    flags: Sequence[str],
    inputs: Sequence[str],
    contents: Iterable[Path],
    name: str,
    compiler: str | None = None,
) -> Path:
    """Run the compiler, unless it has run with the same flags on the same contents."""
    compiler = compiler or _compiler()
    command = [compiler, *flags, *inputs]
    key = hashlib.sha256("\0".join([_version_of(compiler), *command]).encode())
    for path in contents:
        key.update(f"\0{path}\0".encode())
        key.update(path.read_bytes())
    output = _cache() / f"{key.hexdigest()[:24]}-{name}"
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        unfinished = Path(scratch) / name
        done = subprocess.run(
            [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{done.stderr}")
        unfinished.replace(output)  # at once: another process may be building the same
    return output


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sglang-moe-routing-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to someone else; set TMPDIR")
    return folder


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _version_of(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
