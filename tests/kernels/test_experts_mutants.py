"""Faults planted in the CPU experts, and what ``experts_driver.cpp`` must say to each of them.

One file is compiled anew for a mutant, from a changed copy of csrc; the rest is as it was.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.building import CSRC
from tests.kernels.experts_driver import (
    Flavour,
    build_driver,
    instruction_sets,
    run_driver,
    why_unavailable,
)

WRONG = "relative error"
ALONE = "differs from that row alone"
ACCEPTED = "accepted"
MEMORY = "ERROR: AddressSanitizer: (heap-buffer-overflow|SEGV)"
GUARD = "ERROR: AddressSanitizer: SEGV"
LEAK = "ERROR: LeakSanitizer: detected memory leaks"

CALLS = 60


class Mutant(NamedTuple):
    """One place of one source file that reads differently, and what the driver must say to it."""

    compiled: str
    """The file to be compiled, and changed unless `header` is."""
    old: str
    new: str
    caught: str
    """A pattern in what the driver says."""
    flavour: Flavour = "plain"
    header: str = ""

    @property
    def file(self) -> str:
        return self.header or self.compiled

    @property
    def instruction_set(self) -> str:
        """The one that runs the compiled file."""
        name = self.compiled.removeprefix("experts").removesuffix(".cpp").removeprefix("_")
        return name or "portable"


def in_vectors(old: str, new: str, caught: str, flavour: Flavour = "plain") -> Mutant:
    """In the experts by dot products, on the instruction set that every processor runs."""
    return Mutant("experts_portable.cpp", old, new, caught, flavour, "experts_vector.h")


COPY_REST = (
    "__builtin_memcpy(rest[i], weights + i * row_stride + whole, (size - whole) * sizeof(Weight));"
)
REST_OF_TILE = "(size - whole) * sizeof(Bfloat16)"

MUTANTS = {
    "tail_not_copied": in_vectors(COPY_REST, "", WRONG),
    "tail_read_to_the_end_of_a_chunk": in_vectors(
        COPY_REST,
        "__builtin_memcpy(rest[i], weights + i * row_stride + whole, sizeof rest[i]);"
        "for (int64_t k = size - whole; k < Dot::kChunk; ++k) rest[i][k] = Weight{};",
        MEMORY,
        "asan",
    ),
    "padding_of_inputs_not_zeroed": in_vectors("Dot::put(to, k, Weight{});", "", WRONG, "asan"),
    "up_bias_not_interleaved": in_vectors("at.up + r * at.step)", "at.up + r)", WRONG),
    "last_token_added_up_in_another_order": in_vectors(
        "add_up(sums[t], &out[t][r]);",
        "{ add_up(sums[t], &out[t][r]);"
        "for (int i = 0; i < rows && tokens == 1; ++i)"
        "out[t][r + i] = sums[t][i][0] + sums[t][i][1] + sums[t][i][2] + sums[t][i][3]; }",
        ALONE,
    ),
    "vector_stored_past_the_output": Mutant(
        "experts_portable.cpp",
        "for (int64_t j = i; j < count; ++j) out[j] = rest[j - i];",
        "store_floats(out + i, load<Floats>(from + i));",
        MEMORY,
        "asan",
        "experts_numbers.h",
    ),
    "slot_of_weight_0_not_skipped": Mutant(
        "experts.cpp", "if (id < 0 || weight == 0.0f) continue;", "if (id < 0) continue;", WRONG
    ),
    "repeated_id_counts_once": Mutant(
        "experts.cpp", "slots[at].weight += weight;", "slots[at].weight = weight;", WRONG
    ),
    "order_of_experts_depends_on_threads": Mutant(
        "experts.cpp",
        "for (int expert = 0; expert < call_.num_experts; ++expert) {",
        "for (int i = 0; i < call_.num_experts; ++i) {\n"
        "const int expert = call_.num_threads > 1 ? call_.num_experts - 1 - i : i;",
        ALONE,
    ),
    "wide_id_narrowed": Mutant(
        "experts.cpp",
        "const int64_t id = load_id(call_.topk_ids, row, k);",
        "const auto id = static_cast<int32_t>(load_id(call_.topk_ids, row, k));",
        ACCEPTED,
    ),
    "scratch_memory_not_freed": Mutant(
        "experts.cpp", "std::free(data);", "(void)data;", LEAK, "asan"
    ),
    "rest_of_tile_not_copied": Mutant("experts_amx.cpp", REST_OF_TILE, "0 * size", WRONG),
    # Assembly reads what is never used: only the page behind the weights notices.
    "tile_read_past_the_weights": Mutant(
        "experts_amx.cpp",
        "store_tile<kSum00>(sums[0][0]);",
        "load_tile<kWeights0>(first.data + whole, 2 * first.stride);"
        "store_tile<kSum00>(sums[0][0]);",
        GUARD,
        "asan",
    ),
    "padding_of_intermediate_not_zeroed": Mutant(
        "experts_amx.cpp",
        "is_last ? depth(call.intermediate) - column : kTileRows",
        "is_last ? columns : kTileRows",
        WRONG,
        "asan",
    ),
}


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc with the fault."""
    csrc = folder / "csrc"
    for part in ("cpu", "include"):
        shutil.copytree(CSRC / part, csrc / part)
    path = csrc / "cpu" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"found {text.count(mutant.old)} times: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
    return csrc


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_caught(name: str, tmp_path: Path) -> None:
    """The driver, which passes on the real sources, ends with what the fault must cause."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    mutant = MUTANTS[name]
    program = build_driver(mutant.flavour, changed=(plant(mutant, tmp_path), mutant.compiled))
    if mutant.instruction_set not in instruction_sets(program):
        pytest.skip(f"this processor does not run {mutant.instruction_set}")
    done = run_driver(program, 1, CALLS, mutant.instruction_set)
    assert done.returncode != 0
    assert re.search(mutant.caught, done.stderr), done.stderr[:4000]
