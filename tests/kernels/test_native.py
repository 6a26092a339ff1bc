"""Which implementation is chosen, where it is built, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moe_routing.cli import app
from sglang_moe_routing.errors import KernelError
from sglang_moe_routing.kernels import native

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(native.cuda_home() is None, reason="no CUDA toolkit")

CHOOSE = """
from sglang_moe_routing.kernels import choose
chosen = choose("cpu")
print(chosen.name, "|", chosen.reason)
"""


def in_new_process(
    code: str, tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, native.CACHE: str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reference_serves_where_it_is_asked_for(tmp_path: Path) -> None:
    done = in_new_process(CHOOSE, tmp_path, **{native.CHOICE: "torch"})
    assert done.stdout == f"torch reference | {native.CHOICE}=torch\n"


def test_without_a_compiler_the_reference_serves_and_one_line_says_so(tmp_path: Path) -> None:
    done = in_new_process(CHOOSE, tmp_path, CXX="no-such-compiler")
    assert done.stdout == "torch reference | no C++ compiler 'no-such-compiler' on PATH\n"
    assert done.stderr.count("the torch reference does the re-routing") == 1


def test_without_a_compiler_native_is_an_error(tmp_path: Path) -> None:
    done = in_new_process(CHOOSE, tmp_path, CXX="no-such-compiler", **{native.CHOICE: "native"})
    assert "KernelError" in done.stderr
    assert "no C++ compiler 'no-such-compiler'" in done.stderr


@needs_compiler
def test_a_broken_build_is_an_error_not_the_reference(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho something is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = in_new_process(CHOOSE, tmp_path, CXX=str(compiler))
    assert done.returncode != 0
    assert "something is broken" in done.stderr
    assert "torch reference" not in done.stdout


def copied(tmp_path: Path) -> Path:
    """The folder of the CPU kernels, in a cache of its own."""
    built = native.build_cpu()
    return Path(shutil.copytree(built, tmp_path / "cache" / built.name))


@needs_compiler
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_library_is_not_loaded(tmp_path: Path, damage: str) -> None:
    (library,) = copied(tmp_path).glob("*.so")
    content = bytearray(library.read_bytes())
    library.unlink()
    if damage == "cut":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        library.write_bytes(content)
    without_compiler = in_new_process(CHOOSE, tmp_path, PATH="/nowhere")
    assert "torch reference" in without_compiler.stdout, without_compiler.stderr
    assert "damaged or gone" in without_compiler.stderr


MARKS = {
    "empty": "",
    "cut": '{"architectures": [], "sha',
    "without a digest": '{"architectures": [], "tools": {}}',
    "without tools": '{"architectures": [], "sha256": "0"}',
    "a list": "[]",
    "null": "null",
    "another type": '{"architectures": 5, "sha256": "0", "tools": {}}',
    "no number": '{"architectures": ["x"], "sha256": "0", "tools": {}}',
    "binary": "\udcff",
}


@needs_compiler
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_a_mark_that_cannot_be_read_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    folder = copied(tmp_path)
    monkeypatch.setenv(native.CACHE, str(folder.parent))
    assert native._find_built("cpu", ()) == folder
    (folder / "ready.json").write_bytes(mark.encode(errors="surrogateescape"))
    assert native._find_built("cpu", ()) is None


@needs_compiler
def test_what_an_interrupted_build_left_is_built_anew_once(tmp_path: Path) -> None:
    """A cut library, an empty mark, and a cut object file, which is newer than its source."""
    folder = copied(tmp_path)
    (folder / "ready.json").write_text("")
    (folder / "moe_routing_cpu.so").write_bytes(b"")
    cut = next(folder.glob("*.o"))
    cut.write_bytes(cut.read_bytes()[:1000])
    done = in_new_process(CHOOSE, tmp_path)
    assert "damaged or gone" in done.stderr
    assert "compiling the cpu kernels" in done.stderr
    assert "compiled now" in done.stdout
    again = in_new_process(CHOOSE, tmp_path)
    assert "compiled in" in again.stdout
    assert again.stderr == ""


@needs_compiler
def test_who_waited_for_another_process_keeps_its_binary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked, found nothing, and is about to build when the other one is ready."""
    folder = copied(tmp_path)
    monkeypatch.setenv(native.CACHE, str(folder.parent))
    (library,) = folder.glob("*.so")
    before = library.stat()
    assert native._build("cpu", ()) == folder
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


@needs_compiler
def test_a_binary_of_another_compiler_is_built_anew_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any compiler it is used all the same."""
    folder = copied(tmp_path)
    monkeypatch.setenv(native.CACHE, str(folder.parent))
    other = tmp_path / "other-compiler"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo other 1.0 || exec c++ "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert native._find_built("cpu", ()) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native._find_built("cpu", ()) == folder


@needs_compiler
@pytest.mark.parametrize("problem", ["a compiler that fails", "a cache that takes no folder"])
def test_where_nothing_can_be_built_the_binary_of_another_compiler_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    """A prebuilt one, as in an image whose compiler was changed or whose cache is read-only."""
    folder = copied(tmp_path)
    other = tmp_path / "other-compiler"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo other 1.0 || exit 1\n')
    other.chmod(0o755)
    if problem == "a cache that takes no folder":
        monkeypatch.setenv(native.CACHE, str(folder.parent))
        monkeypatch.setenv("CXX", str(other))
        native._folder("cpu", (), native._tools("cpu") or {}).write_text("a file")
    done = in_new_process(CHOOSE, tmp_path, CXX=str(other))
    assert f"| compiled by other tools in {folder}\n" in done.stdout, done.stderr
    assert done.stdout.startswith("cpu ")
    assert f"the cpu kernels are those of other tools in {folder}: compiling" in done.stderr


@needs_compiler
def test_a_compiler_is_the_same_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tmp_path)
    monkeypatch.setenv(native.CACHE, str(folder.parent))
    link = tmp_path / "some-name"
    link.symlink_to(str(shutil.which(os.environ.get("CXX", "c++"))))
    monkeypatch.setenv("CXX", str(link))
    assert native._find_built("cpu", ()) == folder


@pytest.mark.parametrize("given", ["", "/nowhere"])
def test_a_cuda_home_without_a_toolkit_does_not_hide_what_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    """Images set the variable and leave the toolkit out."""
    monkeypatch.setenv(native.CACHE, str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", given)
    monkeypatch.setenv("PATH", "/nowhere")
    folder = tmp_path / f"cuda-{native._fingerprint('cuda')}-0-9.0"
    folder.mkdir()
    (folder / "moe_routing_cuda.so").write_bytes(b"a binary")
    native._mark_ready(folder, "cuda", ["9.0"], {"c++": "some", "nvcc": "12.8"})
    assert native._find_built("cuda", ("9.0",)) == folder


@needs_nvcc
def test_the_toolkit_is_one_of_the_tools() -> None:
    assert "release" in (native._tools("cuda") or {})["nvcc"]


@needs_compiler
def test_the_instruction_set_can_be_chosen(tmp_path: Path) -> None:
    name = {native.CACHE: str(native.cache_folder()), native.INSTRUCTION_SET: "portable"}
    assert in_new_process(CHOOSE, tmp_path, **name).stdout.startswith("cpu portable |")
    name[native.INSTRUCTION_SET] = "sse9"
    assert "'sse9' is not one of" in in_new_process(CHOOSE, tmp_path, **name).stderr


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = in_new_process(CHOOSE, tmp_path, **{native.CHOICE: "fast"})
    assert "'fast' is not one of auto, native, torch" in done.stderr


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("8.0", "8.0", True),
        ("8.0", "8.9", True),
        ("8.9", "8.0", False),
        ("8.9", "9.0", False),
        ("9.0", "10.0", False),
        ("10.0", "10.3", True),
        ("12.0", "12.1", True),
    ],
)
def test_cubins_run_on_later_cards_of_the_same_major_version(
    built: str, device: str, runs: bool
) -> None:
    assert native._runs_on(built, device) == runs


@pytest.mark.parametrize("architecture", ["90", "sm_90", "9.0a", ""])
def test_a_bad_architecture_is_named(architecture: str) -> None:
    with pytest.raises(KernelError, match=r"expected one such as 9\.0"):
        native.build_cuda([architecture])


def test_a_wrong_cuda_home_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(KernelError, match=r"CUDA_HOME=.* holds no CUDA toolkit"):
        native.cuda_home()


@needs_nvcc
@needs_compiler
def test_cuda_kernels_are_built_ahead_of_time_and_load_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build --arch` for a card that is not here; the binary is found for every card it fits."""
    monkeypatch.setenv(native.CACHE, str(tmp_path))
    done = CliRunner().invoke(app, ["build", "--arch", "8.0", "--no-cpu", "--json"])
    assert done.exit_code == 0, done.output
    folder = Path(json.loads(done.stdout)["cuda"])
    assert native._find_built("cuda", ("8.6",)) == folder
    assert native._find_built("cuda", ("9.0",)) is None
    assert callable(native._load(folder, "cuda").bind)
