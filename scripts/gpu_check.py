"""Build the kernels on a machine with a GPU, test them, serve with them, time them: gpu_check.sh.

Each step runs in a process of its own under its own time limit, the newest questions first, until
the time is up. The result is one JSON file, written after every step: a killed run keeps what it
had.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

TOTAL_S = 480
LEAST_S = 15  # a step with less time left is not begun
STOP_S = 30  # for a step to end its servers once it is told to
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
    "prometheus_client": "prometheus-client",
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
VERSIONS = ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "transformers")


class SkippedError(Exception):
    """A step cannot be run here; the message says why."""


class Options(NamedTuple):
    """How the steps run.

    Attributes:
        cpu: on the portable CPU platform, with emulated graphs.
        server_flags: further flags of the servers.
    """

    cpu: bool
    server_flags: Sequence[str]


class Step(NamedTuple):
    """One question.

    Attributes:
        work: finds the answer; raises where it is not the right one.
        limit_s: seconds after which it has failed.
        needs_gpu: whether it cannot be asked on a CPU.
    """

    work: Callable[[Options], Any]
    limit_s: int
    needs_gpu: bool = True


def build(options: Options) -> dict[str, str]:
    from sglang_moe_routing.kernels import choose

    backends = ("cpu",) if options.cpu else ("cpu", "cuda")
    return {backend: choose(backend).name for backend in backends}  # type: ignore[arg-type]


def check_graphs(options: Options) -> Any:
    require_sglang()
    from scripts import gpu_serve

    return gpu_serve.check_graphs(cpu=options.cpu, flags=options.server_flags)


def check_groups(options: Options) -> Any:
    require_sglang()
    from scripts import gpu_serve

    return gpu_serve.check_groups(cpu=options.cpu, flags=options.server_flags)


def run_check(options: Options) -> Any:
    require_sglang()
    return run_command("check")


def run_demo(options: Options) -> Any:
    require_sglang()
    return run_command("demo")


def require_sglang() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise SkippedError("SGLang is not installed")


def run_command(name: str) -> Any:
    command = [sys.executable, "-m", "sglang_moe_routing", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr)[-4000:])
    return json.loads(done.stdout)


def run_pytest(wrapper: Sequence[str], tests: Sequence[str]) -> str:
    """How many tests passed. `wrapper` is a program that runs pytest."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
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
        raise SkippedError("no compute-sanitizer on this machine")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return run_pytest(command, SANITIZED)


def find_sanitizer() -> str | None:
    from sglang_moe_routing.kernels import native

    beside = Path(str(native.cuda_home())) / "bin/compute-sanitizer"
    return str(beside) if beside.exists() else shutil.which("compute-sanitizer")


def measure(options: Options) -> dict[str, Any]:
    from sglang_moe_routing.bench import ops

    rows = (1, 4, 8, 16, 32, 64, 128, 256, 512)
    return ops.summary(list(ops.run(rows, (64, 128, 256, 512), device="cuda")))


STEPS: Mapping[str, Step] = {
    "build": Step(build, 120, needs_gpu=False),
    "graphs": Step(check_graphs, 180, needs_gpu=False),
    "groups": Step(check_groups, 150, needs_gpu=False),
    "check": Step(run_check, 60, needs_gpu=False),
    "gpu tests": Step(lambda options: run_pytest([], GPU_TESTS), 150),
    "kernel tests": Step(lambda options: run_pytest([], KERNEL_TESTS), 150),
    "timings": Step(measure, 60),
    "racecheck": Step(lambda options: sanitize("racecheck"), 90),
    "memcheck": Step(lambda options: sanitize("memcheck"), 90),
    "demo": Step(run_demo, 150, needs_gpu=False),
}
"""By name, in the order in which they run."""


class Report:
    """Results by step, as one JSON file."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path = path
        self._about = about
        self._start = time.monotonic()
        self._steps: dict[str, Any] = {}

    @property
    def is_ok(self) -> bool:
        return not any(step["status"] == "failed" for step in self._steps.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Take the `result` of a step: status, and figures or the reason."""
        self._steps[name] = result
        print(f"    {result['status']} {result.get('reason', '')}"[:4000], file=sys.stderr)
        content = {
            "ok": self.is_ok,
            "skipped": [n for n, step in self._steps.items() if step["status"] == "skipped"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            **self._about,
            "steps": self._steps,
        }
        self._path.write_text(json.dumps(content, indent=2) + "\n")

    def run(self, name: str, options: Options) -> None:
        """Run a step as a process, unless there is a reason not to."""
        print(f"==> {name}", file=sys.stderr, flush=True)
        step, left = STEPS[name], TOTAL_S - self.seconds
        if step.needs_gpu and options.cpu:
            self.add(name, {"status": "skipped", "reason": "needs a GPU"})
        elif left < LEAST_S:
            self.add(name, {"status": "skipped", "reason": f"no time left of {TOTAL_S} s"})
        else:
            start = time.monotonic()
            result = run_apart(name, options, min(step.limit_s, left))
            self.add(name, {**result, "seconds": round(time.monotonic() - start, 1)})


def run_apart(name: str, options: Options, limit_s: float) -> dict[str, Any]:
    """Run a step in a process of its own; its result."""
    command = [sys.executable, __file__, "--step", name]
    command += ["--cpu"] if options.cpu else []
    command += ["--server-flags", shlex.join(options.server_flags)]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process = subprocess.Popen([*command, str(result)], start_new_session=True)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            end(process)
            return {"status": "failed", "reason": f"not done in {limit_s:.0f} s"}
        if not result.exists():
            return {"status": "failed", "reason": f"ended with status {process.returncode}"}
        return dict(json.loads(result.read_text()))


def end(process: subprocess.Popen[bytes]) -> None:
    """Let a step stop what it started, then end it with its processes."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answer(name: str, options: Options) -> dict[str, Any]:
    """The result of a step, in this process."""
    try:
        return {"status": "ok", "figures": STEPS[name].work(options)}
    except SkippedError as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # a step that fails must not hide the others
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def install_packages() -> None:
    missing = [
        name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
        subprocess.run(command, check=True, timeout=180)


def publish_plugin(folder: Path) -> None:
    """Let SGLang find the plugin where the package is not installed: `folder` is on the path."""
    if "moe_routing" in metadata.entry_points(group="sglang.srt.plugins").names:
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {target}\n" for key, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    platform = ROOT / "sglang_moe_routing/cpu/distribution"
    shutil.copytree(platform, folder / "sglang_moe_routing_cpu.egg-info")


def describe_machine(options: Options) -> dict[str, Any]:
    """Accelerator and versions. Raises: RuntimeError if there is no GPU and should be one."""
    import torch

    about: dict[str, Any] = {"accelerator": "none: the portable CPU platform"}
    if not options.cpu:
        about = describe_gpu(torch)
    versions = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["torch"] = torch.__version__
    return {**about, "commit": commit(), "versions": versions}


def describe_gpu(torch: Any) -> dict[str, str]:
    from sglang_moe_routing.kernels import native

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --cpu runs what needs none")
    home = native.cuda_home()
    if home is None:
        raise RuntimeError("no CUDA toolkit: set CUDA_HOME")
    nvcc = subprocess.run(
        [home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True
    )
    major, minor = torch.cuda.get_device_capability()
    return {
        "accelerator": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "nvcc": nvcc.stdout.strip().splitlines()[-1],
    }


def commit() -> str | None:
    """What is checked out, None where there is no repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT") or ".") / "gpu-check.json"
    parser.add_argument(
        "result",
        type=Path,
        nargs="?",
        default=default,
        help="JSON file to write; gpu-check.json in $OUT, or here, if absent.",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="Run what needs no GPU, with emulated graphs, to try the steps.",
    )
    parser.add_argument(
        "--only", action="append", choices=STEPS, help="Run this step; may be given several times."
    )
    parser.add_argument(
        "--server-flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="Further flags of the servers, in one argument, such as '--attention-backend triton'.",
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # the process of a step
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    options = Options(given.cpu, given.server_flags)
    if given.step:
        given.result.write_text(json.dumps(answer(given.step, options)))
        return 0
    path = given.result.absolute()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="moe-routing-") as folder:
        publish_plugin(Path(folder))
        paths = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["SGLANG_MOE_ROUTING_KERNELS"] = "native"
        os.environ.setdefault("OMP_NUM_THREADS", "4")  # for torch's CPU side: small tensors
        os.environ.setdefault("SGLANG_MOE_ROUTING_CACHE", f"{folder}/kernels")
        try:
            install_packages()
            about = describe_machine(options)
        except Exception as error:  # noqa: BLE001  # whatever it is, the file says it
            failed = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            Report(path, {}).add("machine", failed)
            return 1
        report = Report(path, about)
        for name in given.only or STEPS:
            report.run(name, options)
    return 0 if report.is_ok else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
