"""Build the kernels on a machine with a GPU, test them there, and time them. See gpu_check.sh."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "tvm_ffi": "apache-tvm-ffi",
    "ninja": "ninja",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "httpx": "httpx",
    "typer": "typer",
    "rich": "rich",
    "openai": "openai",
    "transformers": "transformers",
}
GPU_TESTS = ("tests/gpu",)
KERNEL_TESTS = (
    "tests/kernels/test_routing.py",
    "tests/kernels/test_routers.py",
    "tests/kernels/test_ops.py",
    "-k",
    "cuda",
)
SANITIZED = (
    "tests/gpu/test_kernels_cuda.py",
    "-k",
    "(bfloat16 or float32 or table) and not 200 and not 1500",
)


class Report:
    """Results by step, written after every one: a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: dict[str, Any] = {}

    @property
    def is_ok(self) -> bool:
        return all(step["ok"] for step in self._steps.values())

    def run(self, name: str, work: Callable[[], Any]) -> bool:
        print(f"==> {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            step = {"ok": True, "result": work()}
        except Exception as error:  # noqa: BLE001  # a step that fails must not hide the others
            step = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            print(f"    failed: {step['error']}"[:4000], file=sys.stderr, flush=True)
        step["seconds"] = round(time.monotonic() - start, 1)
        self._steps[name] = step
        self._path.write_text(json.dumps({"ok": self.is_ok, "steps": self._steps}, indent=2))
        return bool(step["ok"])


def install_packages() -> list[str]:
    missing = [
        name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
        subprocess.run(command, check=True, timeout=180)
    return missing


def describe_machine() -> dict[str, str]:
    import torch

    from sglang_moe_routing.kernels import native

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    home = native.cuda_home()
    if home is None:
        raise RuntimeError("no CUDA toolkit: set CUDA_HOME")
    nvcc = subprocess.run(
        [home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "nvcc": nvcc.stdout.strip().splitlines()[-1],
    }


def build() -> dict[str, str]:
    from sglang_moe_routing.kernels import choose

    return {backend: choose(backend).name for backend in ("cpu", "cuda")}  # type: ignore[arg-type]


def run_tests(tests: Sequence[str]) -> str:
    return run_pytest([], tests, timeout=200)


def run_pytest(wrapper: Sequence[str], tests: Sequence[str], timeout: int) -> str:
    """How many tests passed. `wrapper` is a program that runs pytest."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"status {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}")
    passed = re.search(r"^.*\b[1-9]\d* passed.*$", done.stdout, re.MULTILINE)
    if passed is None:
        raise RuntimeError(f"no test ran\n{(done.stdout + done.stderr)[-6000:]}")
    return passed[0].strip("= ")


def sanitize(tool: str) -> str:
    program = find_sanitizer()
    if program is None:
        return "not run: no compute-sanitizer on this machine"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return run_pytest(command, SANITIZED, timeout=120)


def find_sanitizer() -> str | None:
    from sglang_moe_routing.kernels import native

    beside = Path(str(native.cuda_home())) / "bin/compute-sanitizer"
    return str(beside) if beside.exists() else shutil.which("compute-sanitizer")


def measure() -> dict[str, Any]:
    from sglang_moe_routing.bench import ops

    rows = (1, 4, 8, 16, 32, 64, 128, 256, 512)
    return ops.summary(list(ops.run(rows, (64, 128, 256, 512), device="cuda")))


def run_demo() -> Any:
    if importlib.util.find_spec("sglang") is None:
        return "not run: SGLang is not installed"
    command = [sys.executable, "-m", "sglang_moe_routing", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON result goes")
    report = Report(parser.parse_args().out.absolute())
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["SGLANG_MOE_ROUTING_KERNELS"] = "native"
    os.environ.setdefault("OMP_NUM_THREADS", "4")  # for torch's CPU side: small tensors
    os.environ.setdefault("SGLANG_MOE_ROUTING_CACHE", tempfile.mkdtemp(prefix="moe-routing-"))
    if not report.run("packages", install_packages) or not report.run("machine", describe_machine):
        return 1
    if report.run("build", build):
        report.run("gpu tests", lambda: run_tests(GPU_TESTS))
        report.run("kernel tests", lambda: run_tests(KERNEL_TESTS))
        report.run("timings", measure)
        for tool in ("memcheck", "racecheck"):
            report.run(tool, lambda tool=tool: sanitize(tool))  # type: ignore[misc]
    report.run("demo", run_demo)
    return 0 if report.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
