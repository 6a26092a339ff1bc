"""Command line and environment of an SGLang server with routing policies, and running one."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import httpx

from .. import environment as names
from ..errors import EngineError

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
_RANK_FLAGS = (
    ("--tp", "--tp-size", "--tensor-parallel-size"),
    ("--dp", "--dp-size", "--data-parallel-size"),
)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises: EngineError with the log's tail if the server has ended."""
        status = self.process.poll()
        if status is not None:
            raise EngineError(f"the server ended with status {status}:\n{_tail(self.log)}")


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator that SGLang can use."""
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def server_command(model: str, flags: Sequence[str] = ()) -> list[str]:
    """Arguments that run ``sglang serve`` under this very Python."""
    program = "from sglang.cli.main import main; main()"
    return [sys.executable, "-c", program, "serve", "--model-path", model, *flags]


def server_environment(
    config: Path | None,
    flags: Sequence[str] = (),
    *,
    cpu: bool | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment under which that command serves the policies of `config`.

    Args:
        config: routing config; None serves without policies.
        flags: SGLang's flags, read for the number of ranks.
        cpu: whether to use the portable CPU platform; None decides by what the machine has.
        base: variables to start from, by default this process's. What is set there stays.

    Raises:
        EngineError: SGLang would not load the plugin, or there is no home folder.
    """
    env = dict(os.environ if base is None else base)
    names.require_home(env)
    if config is None:
        env.pop(names.CONFIG, None)
    else:
        env[names.CONFIG] = str(config.absolute())
        _check_plugin_is_loaded(env)
    env.pop(names.CONFIG_SHA256, None)
    if cpu is None:
        cpu = env.get("SGLANG_PLATFORM") == names.PLATFORM or (
            "SGLANG_PLATFORM" not in env and not has_accelerator()
        )
    if cpu:
        env["SGLANG_PLATFORM"] = names.PLATFORM
        for name, value in _cpu_defaults(flags).items():
            env.setdefault(name, value)
    return env


def _cpu_defaults(flags: Sequence[str]) -> dict[str, str]:
    defaults = {
        "TRITON_INTERPRET": "1",  # some models launch Triton kernels outside their experts
        "TORCHDYNAMO_DISABLE": "1",  # SGLang compiles grouped routers; a C++ compiler is no given
        "OMP_WAIT_POLICY": "passive",  # spinning threads starve each other on shared cores
    }
    sizes = [flag_value(flags, names) for names in _RANK_FLAGS]
    num_ranks = math.prod(int(size) for size in sizes if size.isdecimal())
    if num_ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        parts = [cores[rank::num_ranks] or cores for rank in range(num_ranks)]
        defaults["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(map(str, part)) for part in parts
        )
    return defaults


def flag_value(flags: Sequence[str], names: Sequence[str]) -> str:
    """What SGLang's flag of these names is set to, empty if it is not."""
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            return value if equals else "".join(flags[index + 1 : index + 2])
    return ""


def _check_plugin_is_loaded(env: Mapping[str, str]) -> None:
    """SGLang skips plugins silently; a server without policies must not start."""
    if importlib.util.find_spec("sglang") is None:
        raise EngineError(f"sglang is not installed; run: {names.INSTALL_SGLANG}")
    if names.PLUGIN not in entry_points(group="sglang.srt.plugins").names:
        raise EngineError(
            "SGLang cannot find this package's plugin: it is not installed beside SGLang; run: pip "
            "install -e . in its checkout"
        )
    allowed = [name.strip() for name in env.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and names.PLUGIN not in allowed:
        raise EngineError(
            f"SGLANG_PLUGINS={env['SGLANG_PLUGINS']} leaves out {names.PLUGIN!r}; add it"
        )


@contextlib.contextmanager
def running_server(
    model: str | Path,
    *,
    config: Path | None = None,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    log: Path,
    cpu: bool | None = None,
    stop: bool = True,
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Server]:
    """Start a server on a free port, wait until it serves, stop it with all its processes.

    Args:
        environment: variables to add to this process's.
        log: file for the server's output.
        stop: whether to stop it at the end.
        on_wait: called about every half second with the last line of the log.

    Raises:
        EngineError: the server ended or did not become ready; the message holds the log's tail.
    """
    port = free_port()
    arguments = [*flags, "--host", "127.0.0.1", "--port", str(port)]
    env = server_environment(config, arguments, cpu=cpu, base={**os.environ, **(environment or {})})
    with log.open("wb") as output:
        process = subprocess.Popen(
            server_command(str(model), arguments),
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its own group: stopped as a whole
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    is_ready = False
    try:
        _wait_until_ready(server, on_wait)
        is_ready = True
        yield server
    finally:
        if stop or not is_ready:
            stop_server(process)


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process of its group, as Ctrl-C in a terminal does.

    On SIGTERM SGLang takes the end of its scheduler for a crash and waits 5 seconds.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(server: Server, on_wait: Callable[[str], None]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        server.check()
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        on_wait(_tail(server.log, 1))
        time.sleep(0.5)
    raise EngineError(f"the server was not ready in {READY_TIMEOUT_S:.0f} s:\n{_tail(server.log)}")


def _tail(log: Path, num_lines: int = 25) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("sglang-moe-routing:")]
    return "\n".join(own + lines[-num_lines:]) if num_lines > 1 else "".join(lines[-1:])


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
