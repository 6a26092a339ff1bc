"""Build and run ``experts_driver.cpp``: random calls of the CPU experts, without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tests.kernels.building import ASAN_FLAGS, CSRC, Source, build_program

Flavour = Literal["plain", "asan"]

DRIVER = Path(__file__).parent / "experts_driver.cpp"

COMMON_FLAGS = (
    "-std=c++17",
    "-g",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-maybe-uninitialized",  # GCC's own headers of AVX-512
)
EXPERTS_FLAGS: dict[Flavour, tuple[str, ...]] = {
    "plain": ("-O3",),  # as the package builds them
    "asan": ("-O1", *ASAN_FLAGS, "-D_GLIBCXX_ASSERTIONS"),
}
LINK_FLAGS: dict[Flavour, tuple[str, ...]] = {
    "plain": ("-fopenmp",),
    "asan": ("-fopenmp", *ASAN_FLAGS),
}

SANITIZER_OPTIONS = {
    # Memory that was never written holds NaN, so that a result shows that it was read.
    "ASAN_OPTIONS": "detect_leaks=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def why_unavailable(compiler: str | None = None) -> str | None:
    """Why the driver cannot be built here, or None."""
    compiler = compiler or os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not on the PATH"
    return None


def sources(
    experts_flags: Sequence[str], *, changed: tuple[Path, str] | None = None
) -> list[Source]:
    """The driver and what it calls; bindings to Python are no part of it.

    Args:
        experts_flags: for the experts. The driver and the routing beside them, which only the
            table of instruction sets names, are built the same way for every flavour; a
            sanitizer watches their memory all the same, and leaves accesses of theirs alone.
        changed: a copy of csrc and the one file in it to be compiled instead of the original.
    """
    cpu = CSRC / "cpu"
    experts = [*sorted(cpu.glob("experts*.cpp")), cpu / "instruction_set.cpp"]
    found = [
        Source(DRIVER, (*COMMON_FLAGS, "-O1")),
        *(Source(path, (*COMMON_FLAGS, "-O0")) for path in sorted(cpu.glob("route*.cpp"))),
    ]
    for path in experts:
        is_changed = changed is not None and path.name == changed[1]
        csrc = changed[0] if changed is not None and is_changed else CSRC
        found.append(Source(csrc / "cpu" / path.name, (*COMMON_FLAGS, *experts_flags), csrc))
    return found


def build_driver(flavour: Flavour, *, changed: tuple[Path, str] | None = None) -> Path:
    """The driver with or without sanitizers. Raises `building.BuildError`."""
    return build_program(
        sources(EXPERTS_FLAGS[flavour], changed=changed), LINK_FLAGS[flavour], f"experts-{flavour}"
    )


def run_driver(
    program: Path, *args: object, under: Sequence[str] = (), timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run the driver, `under` an emulator perhaps, and return how it ended."""
    return subprocess.run(
        [*under, str(program), *map(str, args)],
        env={**os.environ, **SANITIZER_OPTIONS},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def instruction_sets(program: Path) -> list[str]:
    """What this processor runs, fastest first."""
    return run_driver(program).stdout.split()
