"""What the CUDA compiler makes of the kernels: no spills, registers that fit, no unseen change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import kernel_figures as script
from sglang_moe_routing.kernels.native import cuda_home

SASS = {**dict.fromkeys(script.INSTRUCTIONS, 3), "total": 1459}
KERNEL = script.Kernel(registers=64, spill_bytes=0, stack_bytes=0, shared_bytes=204, sass=SASS)
ONE_BLOCK = "route_one_block<packed, 4>"
SETTLE = "settle_rows<packed, 4>"
REMEDY = "run scripts/kernel_figures.py and say why in the commit"

# ptxas's and nvdisasm's words, shortened
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN11moe_routing4cuda11settle_rowsILb0ELi16EEEvNS_4CallE' for 'sm_90'
ptxas info    : Function properties for _ZN11moe_routing4cuda11settle_rowsILb0ELi16EEEvNS_4CallE
    56 bytes stack frame, 72 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 56 bytes cumulative stack size, 204 bytes smem
ptxas info    : Compile time = 3087.863 ms
ptxas info    : Compiling entry function '_ZN11moe_routing4cuda5clearEv' for 'sm_90'
ptxas info    : Function properties for _ZN11moe_routing4cuda5clearEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""  # noqa: E501
LISTING = """\
\t.target\tsm_90
\t.section\t.text._ZN11moe_routing4cuda11settle_rowsILb0ELi16EEEvNS_4CallE,"ax",@progbits
.text._ZN11moe_routing4cuda11settle_rowsILb0ELi16EEEvNS_4CallE:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.64 R2, desc[UR8][R2.64] ;
        /*0020*/                   REDUX.MAX UR4, R7 ;
        /*0030*/                   CREDUX.MIN UR4, R7 ;
        /*0040*/                   SHFL.BFLY PT, R3, R2, 0x10, 0x1f ;
        /*0050*/               @P1 ATOMS.OR RZ, [R4], R5 ;
.L_x_3:
        /*0060*/                   ATOMG.E.INC.STRONG.GPU PT, R9, desc[UR8][R8.64], R3 ;
        /*0070*/             @!UP1 RED.E.ADD.STRONG.GPU desc[UR8][R8.64], R3 ;
        /*0080*/                   VOTEU.ANY UR6, UPT, PT ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   ERRBAR;
        /*00b0*/                   NOP;
\t.section\t.text._ZN11moe_routing4cuda5clearEv,"ax",@progbits
        /*0000*/                   EXIT ;
        /*0010*/                   NOP;
"""


def figures(nvcc: str = "13.0.88", **changed: Any) -> Any:
    """Two kernels on one architecture; `changed` of the one-block kernel."""
    return script.Figures(nvcc, {"sm_90": {ONE_BLOCK: replace(KERNEL, **changed), SETTLE: KERNEL}})


@pytest.fixture(scope="module")
def compiled() -> Any:
    """Figures of the present kernels on all architectures."""
    if cuda_home() is None:
        pytest.skip("no CUDA toolkit: CUDA_HOME is not set, no nvcc on PATH")
    return script.measure(script.find_tools())


def test_kernels_keep_within_the_limits_on_every_architecture(compiled: Any) -> None:
    assert list(compiled.architectures) == ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert script.over_limits(compiled) == []


def test_kernels_have_the_recorded_figures(compiled: Any) -> None:
    recorded = script.read(script.FIGURES)
    if recorded is not None and recorded.nvcc != compiled.nvcc:
        pytest.skip(f"recorded with nvcc {recorded.nvcc}, found {compiled.nvcc}")
    assert script.changes(compiled, recorded) == []


def test_every_architecture_has_all_kernels(compiled: Any) -> None:
    wanted = {
        f"{kernel}<{key}, {per_lane}>"
        for kernel in ("route_one_block", "decide_rows", "settle_rows")
        for key in ("packed", "wide")
        for per_lane in (2, 4, 8, 16, 32)
    }
    for architecture, kernels in compiled.architectures.items():
        assert set(kernels) == wanted, architecture


def test_unchanged_figures_pass() -> None:
    assert script.check(figures(), figures()) == []


@pytest.mark.parametrize(
    ("changed", "finding"),
    [
        ({"spill_bytes": 8}, "spills: found 8 bytes, allowed 0"),
        ({"stack_bytes": 16}, "stack frame: found 16 bytes, allowed 0"),
        ({"registers": 129}, "registers: found 129, allowed 128"),
    ],
)
def test_a_broken_limit_is_a_finding_recorded_or_not(changed: dict[str, Any], finding: str) -> None:
    broken = figures(**changed)
    assert script.check(broken, broken) == [f"sm_90 {ONE_BLOCK}: {finding}"]


def test_a_changed_figure_is_a_finding() -> None:
    found = figures(shared_bytes=208, sass={**SASS, "REDUX": 4})
    assert script.check(found, figures()) == [
        f"sm_90 {ONE_BLOCK}: shared_bytes: recorded 204, found 208: {REMEDY}",
        f"sm_90 {ONE_BLOCK}: sass REDUX: recorded 3, found 4: {REMEDY}",
    ]


def test_a_new_and_a_vanished_kernel_are_findings() -> None:
    other = script.Figures("13.0.88", {"sm_90": {ONE_BLOCK: KERNEL}})
    assert f"sm_90 {SETTLE}: registers: recorded none, found 64: {REMEDY}" in script.check(
        figures(), other
    )
    assert f"sm_90 {SETTLE}: registers: recorded 64, found none: {REMEDY}" in script.check(
        other, figures()
    )


def test_another_nvcc_is_held_to_the_limits_only() -> None:
    recorded = figures(nvcc="12.8.61")
    assert script.check(figures(shared_bytes=208), recorded) == []
    assert len(script.check(figures(spill_bytes=8), recorded)) == 1


def test_missing_figures_are_a_finding() -> None:
    assert script.check(figures(), None) == [
        "kernel-figures.json: nothing recorded: run scripts/kernel_figures.py"
    ]


@pytest.mark.parametrize(
    ("status", "output", "problem"),
    [
        (0, "ptxas info    : 0 bytes gmem\n", None),
        (
            1,
            'In file\na.cu(2): error: identifier "x" is undefined\n1 error detected\n',
            'does not compile: a.cu(2): error: identifier "x" is undefined',
        ),
        (137, "", "does not compile: nvcc exits with 137"),
        (
            0,
            "ptxas warning : Stack size cannot be determined\n",
            "compiles with a warning: ptxas warning : Stack size cannot be determined",
        ),
    ],
)
def test_a_compile_that_fails_or_warns_is_told(
    status: int, output: str, problem: str | None
) -> None:
    assert script.compile_problem(status, output) == problem


def test_compiler_output_is_read() -> None:
    none = dict.fromkeys(script.INSTRUCTIONS, 0)
    ones = {"SHFL": 1, "BAR": 1, "LDG": 1, "ATOMS": 1, "VOTE": 1}
    assert script.parse(REPORT, LISTING) == {
        "settle_rows<wide, 16>": script.Kernel(
            registers=40,
            spill_bytes=112,
            stack_bytes=56,
            shared_bytes=204,
            sass={**none, **ones, "REDUX": 2, "ATOM": 2, "total": 11},
        ),
        "clear": script.Kernel(8, 0, 0, 0, {**none, "total": 1}),
    }


def test_figures_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert script.read(path) is None
    script.write(figures(), path)
    assert script.read(path) == figures()
    assert ONE_BLOCK in script.summary(script.read(path))


def test_figures_of_all_sizes_share_a_row(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    wider = replace(KERNEL, registers=80, sass={**SASS, "REDUX": 9})
    kernels = {SETTLE: KERNEL, "settle_rows<packed, 16>": wider, "clear": KERNEL}
    written = script.Figures("13.0.88", {"sm_80": kernels, "sm_90": kernels})
    script.write(written, path)
    assert script.read(path) == written
    rows = json.loads(path.read_text())["rows"]
    assert [row[:4] for row in rows[:2]] == [
        ["sm_80", "clear", [], 64],
        ["sm_80", "settle_rows<packed>", [4, 16], [64, 80]],
    ]


class TestCommand:
    @pytest.fixture(autouse=True)
    def recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An own file, and no compiling."""
        path = tmp_path / "kernel-figures.json"
        script.write(figures(), path)
        monkeypatch.setattr(script, "FIGURES", path)
        monkeypatch.setattr(script, "find_tools", lambda: None)
        self.finds(monkeypatch, figures())
        return path

    def finds(self, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
        monkeypatch.setattr(script, "measure", lambda _: found)

    def test_check_fails_with_a_line_for_each_finding(
        self, recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert script.main(["--check"]) == 0
        self.finds(monkeypatch, figures(spill_bytes=8))
        before = recorded.read_text()
        assert script.main(["--check"]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 2  # the limit, the change
        assert recorded.read_text() == before

    def test_check_says_why_it_does_not_compare(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.finds(monkeypatch, figures(nvcc="14.0.1", shared_bytes=208))
        assert script.main(["--check"]) == 0
        said = "recorded with nvcc 13.0.88, found 14.0.1: figures not compared\n"
        assert capsys.readouterr().err == said

    def test_recording_a_broken_limit_fails_all_the_same(
        self, recorded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.finds(monkeypatch, figures(shared_bytes=208))
        assert script.main([]) == 0
        assert script.read(recorded) == figures(shared_bytes=208)
        self.finds(monkeypatch, figures(spill_bytes=8))
        assert script.main([]) == 1

    def test_a_failed_compile_has_status_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(_: Any) -> Any:
            raise script.CompileError("sm_80: does not compile: a.cu(2): error: x")

        monkeypatch.setattr(script, "measure", fail)
        assert script.main(["--check"]) == 1
        assert capsys.readouterr().err == "sm_80: does not compile: a.cu(2): error: x\n"


def test_no_nvcc_has_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "cuda_home", lambda: None)
    assert script.main(["--check"]) == 2
    assert "no nvcc: CUDA_HOME is not set" in capsys.readouterr().err


def test_no_nvdisasm_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(script, "cuda_home", lambda: tmp_path)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: None)
    assert script.main([]) == 2
    assert f"no nvdisasm in {nvcc.parent}; triton" in capsys.readouterr().err
