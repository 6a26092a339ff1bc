"""Write docs/kernel-figures.json: what the CUDA compiler makes of the kernels. Needs no GPU.

    python scripts/kernel_figures.py            compile for every architecture, record the figures
    python scripts/kernel_figures.py --check    compile; fail over a limit or a changed figure
    python scripts/kernel_figures.py --summary  print what is recorded; compiles nothing

Per kernel and architecture: registers, spills, stack, shared memory, and how many instructions the
machine code has of the kinds that cost most (how many it executes depends on the call). Either run
fails if a kernel does not compile without warnings, spills, has a stack frame or needs too many
registers. Figures recorded with another version of nvcc are not compared.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_moe_routing.errors import KernelError
from sglang_moe_routing.kernels.native import TARGET_ARCHITECTURES, cuda_home

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FIGURES = ROOT / "docs" / "kernel-figures.json"
COMMAND = "scripts/kernel_figures.py"

ARCHITECTURES = tuple("sm_" + name.replace(".", "") for name in TARGET_ARCHITECTURES)
SUMMARY_ARCHITECTURE = "sm_90"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra",
)
PARALLEL_COMPILES = 2

MAX_REGISTERS = 128
"""What the 512 threads of the kernel of one block can have; for the kernels of many blocks half of
what their 256 threads could have, so that two blocks fit."""

MAX_REGISTERS_MOST_EXPERTS = 255
"""For the kernels of many blocks where a lane holds 32 experts: one block fits."""

INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "REDUX": ("REDUX", "CREDUX"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR",),
    "LDG": ("LDG",),
    "ATOM": ("ATOM", "ATOMG", "RED", "REDG"),
    "ATOMS": ("ATOMS",),
    "VOTE": ("VOTE", "VOTEU"),
}
TOTAL = "total"  # without the NOPs that pad the code
SASS = (*INSTRUCTIONS, TOTAL)
RESOURCES = ("registers", "spill_bytes", "stack_bytes", "shared_bytes")  # of a `Kernel`
SIZE = re.compile(r", (\d+)>$")

# Has all instances.
PROGRAM = """\
#include "cuda/route.cuh"

cudaError_t call_route(const moe_routing::Call& call, cudaStream_t stream) {
  return moe_routing::cuda::route(call, stream);
}
"""


class ToolError(Exception):
    """The kernels cannot be compiled or disassembled here."""


class CompileError(Exception):
    """Some compile failed or warned; one line for each architecture."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs on one architecture. Spills: bytes stored plus bytes loaded."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    sass: Mapping[str, int]


@dataclass(frozen=True)
class Figures:
    """All kernels by name by architecture, and the version of nvcc that compiled them."""

    nvcc: str
    architectures: Mapping[str, Mapping[str, Kernel]]


@dataclass(frozen=True)
class Tools:
    nvcc: Path
    nvdisasm: Path
    version: str


def find_tools() -> Tools:
    """Raises `ToolError`."""
    try:
        home = cuda_home()
    except KernelError as error:
        raise ToolError(str(error)) from error
    if home is None:
        raise ToolError("no nvcc: CUDA_HOME is not set, and none is on PATH or in /usr/local")
    nvcc = home / "bin" / "nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"\bV([\d.]+)", said)
    if version is None:
        raise ToolError(f"{nvcc} --version names no version")
    return Tools(nvcc, _find_nvdisasm(home), version[1])


def _find_nvdisasm(home: Path) -> Path:
    places = [home / "bin" / "nvdisasm"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    for place in places:
        if place.is_file():
            return place
    looked_in = ", ".join(str(place.parent) for place in places)
    without = "" if triton is not None else "; triton, whose wheel has one, is not installed"
    raise ToolError(f"no nvdisasm in {looked_in}{without}")


def measure(tools: Tools) -> Figures:
    """Compile for all architectures, about 100 seconds on two cores. Raises `CompileError`."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PARALLEL_COMPILES) as pool:
        source = Path(folder) / "kernels.cu"
        source.write_text(PROGRAM)
        # in two steps, the first ones before all second ones, to keep two cores busy to the end
        steps = [(name, pool.submit(_compile, tools, source, name)) for name in ARCHITECTURES]
        results = [(name, pool.submit(_assemble, tools, step, name)) for name, step in steps]
        found: dict[str, dict[str, Kernel]] = {}
        errors = []
        for architecture, result in results:
            try:
                found[architecture] = result.result()
            except CompileError as error:
                errors.append(f"{architecture}: {error}")
    if errors:
        raise CompileError("\n".join(errors))
    return Figures(tools.version, found)


def _compile(tools: Tools, source: Path, architecture: str) -> Path:
    ptx = source.with_name(f"{architecture}.ptx")
    folders = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    _run_nvcc([tools.nvcc, *FLAGS, f"-arch={architecture}", *folders, "-ptx", "-o", ptx, source])
    return ptx


def _assemble(tools: Tools, compiled: Future[Path], architecture: str) -> dict[str, Kernel]:
    ptx = compiled.result()
    cubin = ptx.with_suffix(".cubin")
    flags = [*FLAGS, f"-arch={architecture}", "--resource-usage"]
    report = _run_nvcc([tools.nvcc, *flags, "-cubin", "-o", cubin, ptx])
    listing = subprocess.run(
        [tools.nvdisasm, "-c", cubin], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        raise CompileError(f"nvdisasm failed: {listing.stderr.strip()}")
    return parse(report, listing.stdout)


def _run_nvcc(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    problem = compile_problem(done.returncode, output)
    if problem is not None:
        raise CompileError(problem)
    return output


def compile_problem(status: int, output: str) -> str | None:
    """What is wrong with a compile, on one line; None if nothing is."""
    lines = [line.strip() for line in output.splitlines()]
    error = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), None)
    if status != 0:
        return f"does not compile: {error or ' '.join(lines[-1:]) or f'nvcc exits with {status}'}"
    warning = next((line for line in lines if re.search(r"\bwarning\b", line)), None)
    return f"compiles with a warning: {warning}" if warning else None


def parse(report: str, listing: str) -> dict[str, Kernel]:
    """Kernels by name, from what ptxas reports and nvdisasm lists."""
    sass = count_instructions(listing)
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        mangled = part[: part.index("'")]
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise CompileError(f"ptxas reports no registers of {mangled}")
        kernels[readable(mangled)] = Kernel(
            registers=int(registers[1]),
            spill_bytes=_sum(r"(\d+) bytes spill", part),
            stack_bytes=_sum(r"(\d+) bytes stack frame", part),
            shared_bytes=_sum(r"(\d+) bytes smem", part),
            sass=sass[mangled],
        )
    if not kernels:
        raise CompileError("ptxas reports no kernel")
    return kernels


def _sum(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def count_instructions(listing: str) -> dict[str, dict[str, int]]:
    """Instructions of each kind, by mangled name of the kernel, from what nvdisasm -c prints."""
    groups = {opcode: group for group, opcodes in INSTRUCTIONS.items() for opcode in opcodes}
    instruction = re.compile(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z]\w*)", re.MULTILINE
    )
    counts = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        opcodes = Counter(instruction.findall(part))
        del opcodes["NOP"]
        count = dict.fromkeys(INSTRUCTIONS, 0)
        for opcode, number in opcodes.items():
            if opcode in groups:
                count[groups[opcode]] += number
        counts[part[: part.index(",")]] = {**count, TOTAL: opcodes.total()}
    return counts


def readable(mangled: str) -> str:
    """Such as route_one_block<packed, 4>; a name of another form stays as it is."""
    if not mangled.startswith("_ZN"):
        return mangled
    name, rest = "", mangled[3:]
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    arguments = re.match(r"I((?:L[bi]\d+E)+)E", rest)
    if arguments is None:
        return name or mangled
    values = re.findall(r"L([bi])(\d+)E", arguments[1])
    words = {("b", "0"): "wide", ("b", "1"): "packed"}
    return f"{name}<{', '.join(words.get((kind, value), value) for kind, value in values)}>"


def check(found: Figures, recorded: Figures | None) -> list[str]:
    """One line for each broken limit and each figure that is not as recorded."""
    return over_limits(found) + changes(found, recorded)


def over_limits(found: Figures) -> list[str]:
    findings = []
    for architecture, name, kernel in _each(found):
        where = f"{architecture} {name}"
        if kernel.spill_bytes:
            findings.append(f"{where}: spills: found {kernel.spill_bytes} bytes, allowed 0")
        if kernel.stack_bytes:
            findings.append(f"{where}: stack frame: found {kernel.stack_bytes} bytes, allowed 0")
        if kernel.registers > (most := _max_registers(name)):
            findings.append(f"{where}: registers: found {kernel.registers}, allowed {most}")
    return findings


def _max_registers(kernel: str) -> int:
    is_widest = kernel.endswith(" 32>") and not kernel.startswith("route_one_block")
    return MAX_REGISTERS_MOST_EXPERTS if is_widest else MAX_REGISTERS


def changes(found: Figures, recorded: Figures | None) -> list[str]:
    """Empty if another version of nvcc compiled what is recorded."""
    if recorded is None:
        return [f"{FIGURES.name}: nothing recorded: run {COMMAND}"]
    if recorded.nvcc != found.nvcc:
        return []
    before, after = _flat(recorded), _flat(found)
    return [
        f"{where}: recorded {before.get(where, 'none')}, found {after.get(where, 'none')}: "
        f"run {COMMAND} and say why in the commit"
        for where in dict.fromkeys([*after, *before])
        if before.get(where) != after.get(where)
    ]


def _each(figures: Figures) -> Iterator[tuple[str, str, Kernel]]:
    for architecture, kernels in figures.architectures.items():
        for name in sorted(kernels, key=_by_size):
            yield architecture, name, kernels[name]


def _flat(figures: Figures) -> dict[str, int]:
    flat: dict[str, int] = {}
    for architecture, name, kernel in _each(figures):
        numbers: dict[str, Any] = asdict(kernel)
        numbers |= {f"sass {kind}": count for kind, count in numbers.pop("sass").items()}
        flat |= {f"{architecture} {name}: {what}": value for what, value in numbers.items()}
    return flat


def _by_size(name: str) -> tuple[str, int]:
    """Sorts <packed, 8> before <packed, 16>."""
    return re.sub(r"\d+", "", name), int("".join(re.findall(r"\d+", name)) or 0)


def read(path: Path) -> Figures | None:
    """What is recorded; None without a file."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    found: dict[str, dict[str, Kernel]] = {}
    for architecture, family, sizes, *columns in content["rows"]:
        for position, name in enumerate(_names(family, sizes)):
            numbers = [c[position] if isinstance(c, list) else c for c in columns]
            sass = dict(zip(SASS, numbers[len(RESOURCES) :], strict=True))
            found.setdefault(architecture, {})[name] = Kernel(*numbers[: len(RESOURCES)], sass)
    return Figures(content["nvcc"], found)


def write(figures: Figures, path: Path) -> None:
    """One row for all sizes of a kernel; a number stands for all of them, a list for each."""
    head = {
        "command": f"python {COMMAND}",
        "config": " ".join(FLAGS),
        "commit": _commit(),
        "date": str(datetime.date.today()),
        "machine": "none: compiled, not run",
        "nvcc": figures.nvcc,
        "columns": ["architecture", "kernel", "experts a lane", *RESOURCES, *SASS],
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in _rows(figures))
    path.write_text("{\n " + ",\n ".join([*lines, f'"rows": [\n  {rows}\n ]']) + "\n}\n")


def _rows(figures: Figures) -> Iterator[list[Any]]:
    for architecture, kernels in sorted(figures.architectures.items()):
        for family, mine in itertools.groupby(sorted(kernels, key=_by_size), _family):
            names = list(mine)
            sizes = [int(size[1]) for name in names if (size := SIZE.search(name))]
            numbers = [[*_resources(kernels[n]), *kernels[n].sass.values()] for n in names]
            columns = zip(*numbers, strict=True)
            yield [architecture, family, sizes, *(c[0] if len({*c}) == 1 else c for c in columns)]


def _family(name: str) -> str:
    """Such as route_one_block<packed>."""
    return SIZE.sub(">", name)


def _names(family: str, sizes: Sequence[int]) -> list[str]:
    return [f"{family[:-1]}, {size}>" for size in sizes] or [family]


def _resources(kernel: Kernel) -> list[int]:
    return [getattr(kernel, name) for name in RESOURCES]


def _commit() -> str:
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def summary(figures: Figures) -> str:
    """Registers on each architecture and instructions on one, a line for each kernel."""
    names = sorted({name for _, name, _ in _each(figures)}, key=_by_size)
    architectures = [name for name in ARCHITECTURES if name in figures.architectures]
    rows = [["registers on", *architectures, f"{SUMMARY_ARCHITECTURE}:", *SASS]]
    for name in names:
        found = [figures.architectures[a].get(name) for a in architectures]
        counts = figures.architectures[SUMMARY_ARCHITECTURE][name].sass
        registers = [str(kernel.registers) if kernel else "-" for kernel in found]
        rows.append([name, *registers, "", *(str(counts[kind]) for kind in SASS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    return "\n".join([f"nvcc {figures.nvcc}", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="Compile and compare; write nothing.")
    choice.add_argument("--summary", action="store_true", help="Print the recorded figures.")
    options = parser.parse_args(arguments)
    recorded = read(FIGURES)
    if options.summary:
        if recorded is None:
            print(f"{FIGURES} is missing: run {COMMAND}", file=sys.stderr)
            return 1
        print(summary(recorded))
        return 0
    try:
        tools = find_tools()
        found = measure(tools)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        findings = check(found, recorded)
        if recorded is not None and recorded.nvcc != found.nvcc:
            note = f"recorded with nvcc {recorded.nvcc}, found {found.nvcc}: figures not compared"
            print(note, file=sys.stderr)
    else:
        write(found, FIGURES)
        findings = over_limits(found)
    for finding in findings:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
