"""Random calls of the CPU experts in C++ alone: against plain loops, with and without sanitizers.

Every buffer of the driver has its exact size and ends on the heap or before a page without access;
what a call must not read is NaN. See ``experts_driver.cpp``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.kernels.building import build_program
from tests.kernels.experts_driver import (
    Flavour,
    build_driver,
    instruction_sets,
    run_driver,
    sources,
    why_unavailable,
)

CALLS: dict[Flavour, int] = {"plain": 100, "asan": 40}
AARCH64 = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")


def assert_right(program: Path, *args: object, under: tuple[str, ...] = ()) -> list[str]:
    """The driver finds nothing wrong and says nothing else. Returns which sets it ran."""
    done = run_driver(program, *args, under=under)
    assert not done.stderr, done.stderr[:4000]
    assert done.returncode == 0
    return re.findall(r"^(\w+): \d+ calls", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("flavour", ["plain", "asan"])
def test_experts_are_right_and_keep_to_their_memory(flavour: Flavour, seed: int) -> None:
    """On every instruction set: values, rows alone and beside NaN, ids refused, memory, leaks."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    program = build_driver(flavour)
    assert assert_right(program, seed, CALLS[flavour]) == instruction_sets(program)


def test_portable_experts_are_right_on_aarch64() -> None:
    """The same driver for another processor, emulated."""
    reason = why_unavailable(AARCH64)
    if reason is not None:
        pytest.skip(f"{reason} (Debian: g++-aarch64-linux-gnu)")
    emulator = next(filter(shutil.which, EMULATORS), None)
    if emulator is None:
        pytest.skip(f"no emulator: neither of {', '.join(EMULATORS)} is on the PATH (qemu-user)")
    program = build_program(
        sources(["-O2"]), ["-static", "-fopenmp"], "experts-aarch64", compiler=AARCH64
    )
    assert assert_right(program, 1, 20, under=(emulator,)) == ["portable"]
