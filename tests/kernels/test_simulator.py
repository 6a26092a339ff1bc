"""Which build of the simulator reports which fault, and that none reports what is right."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.building import (
    FLAVOURS,
    BuildError,
    Flavour,
    build,
    cuda_include,
    run,
    why_unavailable,
)

SOURCE = Path(__file__).with_name("faults.cu")

RIGHT = "right"
WRONG = "wrong"
RACE = "WARNING: ThreadSanitizer: data race"
POISON = "ERROR: AddressSanitizer: use-after-poison"


class Reports(NamedTuple):
    """What each build makes of a fault: RIGHT where it goes unseen."""

    plain: str
    asan: str
    tsan: str


def everywhere(message: str) -> Reports:
    """The simulator itself raises an error, or the result shows the fault."""
    return Reports(message, message, message)


ONLY_A_RACE = Reports(RIGHT, RIGHT, RACE)
WRONG_AND_A_RACE = Reports(WRONG, WRONG, RACE)
POISONED = Reports(RIGHT, POISON, RIGHT)

FAULTS = {
    "barrier_in_branches": everywhere("error: divergent __syncthreads: block (0,0,0) thread 0"),
    "exit_before_barrier": everywhere("error: __syncthreads after 1 thread(s) exited"),
    "no_barrier_before_read": WRONG_AND_A_RACE,
    "no_barrier_before_reuse": ONLY_A_RACE,
    "outside_own_mask": everywhere("error: calling lane is not in its own mask"),
    "half_warp_missing": everywhere("error: deadlock: no thread can run; waiting:"),
    "collectives_differ": everywhere("error: warp collective mismatch"),
    "masks_differ": everywhere("error: deadlock: no thread can run; waiting:"),
    "shuffle_from_outside": everywhere("error: shuffle reads lane 16, which is not taking part"),
    "odd_shuffle_width": everywhere("error: shuffle width 12 is not a power of two up to 32"),
    "no_syncwarp": WRONG_AND_A_RACE,
    "shuffle_for_syncwarp": ONLY_A_RACE,
    "syncwarp_of_halves": WRONG_AND_A_RACE,
    "blocks_add": ONLY_A_RACE,
    "blocks_add_after_barrier": ONLY_A_RACE,
    "blocks_add_with_fences": ONLY_A_RACE,
    "last_block_no_writer_fence": ONLY_A_RACE,
    "last_block_no_reader_fence": ONLY_A_RACE,
    "last_block_narrow_writer_fence": ONLY_A_RACE,
    "dependent_read": ONLY_A_RACE,
    "dependent_write": ONLY_A_RACE,
    "dependent_chain": ONLY_A_RACE,
    "uninitialised_shared": everywhere(WRONG),
    "index_past_member": Reports(WRONG, "runtime error: index 8 out of bounds", WRONG),
    "past_static_shared": POISONED,
    "past_dynamic_shared": POISONED,
    "misaligned_load": Reports(RIGHT, "runtime error: member access within misaligned", RIGHT),
    "too_much_static_shared": everywhere("error: too much shared memory: 131072 bytes static"),
    "trap": everywhere("error: __trap: block (0,0,0) thread 3 (warp 0 lane 3)"),
    "too_much_dynamic_shared": everywhere("error: too much shared memory: 232449 bytes dynamic"),
    "block_too_big": everywhere("error: launch configuration too big"),
    "grid_too_big": everywhere("error: launch configuration too big"),
    "grid_empty": everywhere("error: launch configuration empty"),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Path]]:
    """The faults, built in each flavour and once with ucontext's switch of fibers."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with ThreadPoolExecutor(max_workers=2) as pool:
        building: dict[str, Future[Path]] = {
            flavour: pool.submit(build, [SOURCE], flavour) for flavour in FLAVOURS
        }
        building["ucontext"] = pool.submit(build, [SOURCE], "plain", defines=["SIMT_UCONTEXT"])
        yield {name: future.result() for name, future in building.items()}


def verdict(done: subprocess.CompletedProcess[str]) -> str:
    """RIGHT, or how the run ended and what it said."""
    return RIGHT if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr}"


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(programs: dict[str, Path], fault: str, flavour: Flavour) -> None:
    assert getattr(FAULTS[fault], flavour) in verdict(run(programs[flavour], fault, "faulty"))


@pytest.mark.parametrize("fault", ["half_warp_missing", "no_barrier_before_read"])
def test_fault_is_reported_with_ucontext(programs: dict[str, Path], fault: str) -> None:
    assert FAULTS[fault].plain in verdict(run(programs["ucontext"], fault, "faulty"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("build_name", [*FLAVOURS, "ucontext"])
def test_what_is_right_passes(programs: dict[str, Path], build_name: str, seed: int) -> None:
    assert verdict(run(programs[build_name], "all", "right", seed=seed)) == RIGHT


def test_every_fault_is_listed(programs: dict[str, Path]) -> None:
    named = set(run(programs["plain"], "names").stdout.split())
    assert named == set(FAULTS)


def test_report_names_the_line(programs: dict[str, Path]) -> None:
    lines = SOURCE.read_text().splitlines()
    (line,) = (i for i, text in enumerate(lines, start=1) if "!! outside_own_mask" in text)
    assert f"faults.cu:{line}\n" in run(programs["plain"], "outside_own_mask", "faulty").stderr


def test_deadlock_lists_some_of_the_waiting(programs: dict[str, Path]) -> None:
    said = run(programs["plain"], "half_warp_missing", "faulty").stderr
    assert said.count("block (0,0,0) thread ") == 4
    assert "... 28 more" in said


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_built_program_is_kept(programs: dict[str, Path], flavour: Flavour) -> None:
    built_at = programs[flavour].stat().st_mtime_ns
    assert build([SOURCE], flavour) == programs[flavour]
    assert programs[flavour].stat().st_mtime_ns == built_at


def test_refused_source_is_shown(tmp_path: Path, programs: dict[str, Path]) -> None:
    source = tmp_path / "plain_shared.cu"
    source.write_text(
        '#include "cuda/portable.cuh"\n__global__ void kernel() { __shared__ int x; x = 0; }\n'
    )
    with pytest.raises(BuildError, match="shared memory is declared with SIMT_SHARED"):
        build([source], "plain")


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no CUDA headers.* {tmp_path}/include.*CUDA_HOME"):
        cuda_include()
