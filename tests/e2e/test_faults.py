"""What breaks around a server ends in an error that says so; the server goes on or ends with one.

Faults of configs, artifacts, flags and hooks at start-up are in test_failing_closed.py.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from sglang_moe_routing import demo
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.kernels import native

from .conftest import CONFIG, HEADER, Running

COMPLETION = {"model": "demo", "prompt": "The", "max_tokens": 2, "temperature": 0}
SIMILARITY = demo.CONFIG.with_name("similarity.safetensors")


class Answer(NamedTuple):
    status: int
    policy: str | None
    body: bytes

    @property
    def message(self) -> str:
        """The error's text: SGLang's JSON, or the plain text of the HTTP parser."""
        if not self.body.startswith(b"{"):
            return self.body.decode()
        answer = json.loads(self.body)
        error = answer.get("error")
        return str(error.get("message") if isinstance(error, dict) else error or answer["message"])


def send(
    url: str,
    path: str = "/v1/completions",
    body: object = COMPLETION,
    headers: Sequence[bytes] = (),
    method: str = "POST",
) -> Answer:
    """One request on a connection of its own, its header lines sent as they are.

    HTTP clients refuse to send most of what is tried here.
    """
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1".encode(),
        b"Host: server",
        b"Connection: close",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(content),
        *headers,
    ]
    where = urlsplit(url)
    assert where.port is not None
    with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + content)
        with http.client.HTTPResponse(connection, method=method) as response:
            response.begin()
            return Answer(response.status, response.headers[HEADER], response.read())


def policy_header(value: bytes) -> bytes:
    return HEADER.encode() + b": " + value


def check_serves(url: str) -> None:
    """Requests under a policy and under none work."""
    answer = send(url, headers=[policy_header(b"oea-k3")])
    assert (answer.status, answer.policy) == (200, "oea-k3")
    answer = send(url)
    assert (answer.status, answer.policy) == (200, "vanilla")


# --- headers -----------------------------------------------------------------------------------

MALFORMED = "malformed MoE routing policy {} in header X-MoE-Routing-Policy: expected one policy"
CONTRADICTORY = (
    "contradictory MoE routing policies: header X-MoE-Routing-Policy says 'oea-k3', "
    "header X-MoE-Routing-Policy says 'vanilla'; name one"
)
NOT_HTTP = "Invalid HTTP request received."

HEADERS = {
    "64 KiB": ([b"a" * 65536], ""),
    "60 kB": ([b"a" * 60000], "malformed MoE routing policy"),
    "latin-1": ([b"caf\xe9"], MALFORMED.format("'café'")),
    "UTF-8": (["küche".encode()], MALFORMED.format("'kÃ¼che'")),
    "no text at all": ([bytes(range(0x80, 0x100))], "malformed MoE routing policy"),
    "twice": ([b"oea-k3", b"vanilla"], CONTRADICTORY),
    "1000 times and another": ([b"oea-k3"] * 1000 + [b"vanilla"], CONTRADICTORY),
    "list": ([b"oea-k3, vanilla"], CONTRADICTORY),
    "list with a gap": ([b"oea-k3,,oea-k3"], MALFORMED.format("''")),
    "quoted": ([b'"oea-k3"'], "malformed MoE routing policy"),
    "empty": ([b""], MALFORMED.format("''")),
    "spaces": ([b"     "], MALFORMED.format("''")),
    "tabs": ([b"\t\t"], MALFORMED.format("''")),
    "tab inside": ([b"oea\tk3"], MALFORMED.format(r"'oea\tk3'")),
    "folded": ([b"oea-k3\r\n vanilla"], MALFORMED.format("'oea-k3 vanilla'")),
    "control character": ([b"oea\x01k3"], MALFORMED.format(r"'oea\x01k3'")),
    "escape sequence": ([b"\x1b[31moea"], MALFORMED.format(r"'\x1b[31moea'")),
    "delete": ([b"oea-k3\x7f"], MALFORMED.format(r"'oea-k3\x7f'")),
    "NUL": ([b"oea\0k3"], NOT_HTTP),
    "carriage return": ([b"oea\rk3"], NOT_HTTP),
    "vertical tab": ([b"oea-k3\x0b"], NOT_HTTP),
    "format string": ([b"%s%n{0}"], MALFORMED.format("'%s%n{0}'")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_strange_header_is_a_400_and_the_next_request_works(served: Running, case: str) -> None:
    values, message = HEADERS[case]
    answer = send(served.url, headers=[policy_header(value) for value in values])
    assert (answer.status, answer.policy) == (400, None)
    assert answer.message
    assert message in answer.message
    assert not any(byte in answer.body for byte in (b"\x1b", b"\x01", b"\x7f"))
    check_serves(served.url)


# --- names that look like files ----------------------------------------------------------------

IN_OPEN = 0x20
CANARY = "canary.yaml"


@contextmanager
def opened(path: Path) -> Iterator[Callable[[], bool]]:
    """Whether any process has opened `path` since (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        assert libc.inotify_add_watch(watch, bytes(path), IN_OPEN) >= 0, os.strerror(
            ctypes.get_errno()
        )

        def was_opened() -> bool:
            try:
                return bool(os.read(watch, 4096))
            except BlockingIOError:
                return False

        yield was_opened
    finally:
        os.close(watch)


WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "header": lambda name: {"headers": [policy_header(name.encode())]},
    "body": lambda name: {"body": {**COMPLETION, "custom_params": {"moe_routing_policy": name}}},
    "alias": lambda name: {"body": {**COMPLETION, "model": f"demo@{name}"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_looks_like_a_file_opens_none(served: Running, config: Path, way: str) -> None:
    canary = config.with_name(CANARY)
    canary.write_text(CONFIG)
    home = Path.home()
    names = [
        "../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        r"C:\windows\win.ini",
        "${HOME}",
        CANARY,
        str(canary),
        canary.as_uri(),
        os.path.relpath(canary),
        f"${{HOME}}/{os.path.relpath(canary, home)}",
        f"~/{os.path.relpath(canary, home)}",
    ]
    with opened(canary) as was_opened:
        for name in names:
            answer = send(served.url, **WAYS[way](name))
            assert (answer.status, answer.policy) == (400, None), name
            assert repr(name) in answer.message
        assert not was_opened()
        canary.read_bytes()
        assert was_opened(), "the watch sees nothing"
    check_serves(served.url)


# --- files that go while the server runs -------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def make_unreadable(path: Path) -> None:
    """A folder in its place: permissions do not stop root."""
    path.unlink()
    path.mkdir()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_text("version: 1\npolices: [")


@contextmanager
def damaged(path: Path, damage: Callable[[Path], None]) -> Iterator[None]:
    content = path.read_bytes()
    damage(path)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A config and an artifact that may be damaged."""
    folder = tmp_path_factory.mktemp("own")
    files = {"config": folder / "routing.yaml", "artifact": folder / "own.safetensors"}
    files["config"].write_text(CONFIG.replace(str(SIMILARITY), files["artifact"].name))
    shutil.copy(SIMILARITY, files["artifact"])
    return files


@pytest.fixture(scope="module")
def own(start: Callable[..., Any], own_files: dict[str, Path]) -> Iterator[Running]:
    with start(own_files["config"]) as running:
        yield running


@pytest.mark.parametrize("damage", [remove, make_unreadable, truncate, overwrite])
@pytest.mark.parametrize("file", ["config", "artifact"])
def test_a_file_damaged_while_serving_changes_nothing(
    own: Running, own_files: dict[str, Path], file: str, damage: Callable[[Path], None]
) -> None:
    before = send(own.url, "/v1/moe_routing/policies", None, method="GET")
    with damaged(own_files[file], damage):
        check_serves(own.url)
        answer = send(own.url, headers=[policy_header(b"sere-s2")])
        assert (answer.status, answer.policy) == (200, "sere-s2")
        after = send(own.url, "/v1/moe_routing/policies", None, method="GET")
    assert (after.status, after.body) == (200, before.body)


# --- a killed scheduler ------------------------------------------------------------------------


class Client(threading.Thread):
    """A long request; remembers how it ended."""

    def __init__(self, url: str, stream: bool, policy: str) -> None:
        super().__init__(daemon=True)
        self._url, self._stream, self._policy = url, stream, policy
        self.has_begun = threading.Event()
        self.outcome = ""

    def run(self) -> None:
        body = {**COMPLETION, "max_tokens": 3500, "ignore_eos": True, "stream": self._stream}
        request = {"json": body, "headers": {HEADER: self._policy}, "timeout": 300}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", **request) as response:
                for _ in response.iter_raw():
                    if response.status_code == httpx.codes.OK:
                        self.has_begun.set()
                self.outcome = f"status {response.status_code}"
        except httpx.HTTPError as error:
            self.outcome = type(error).__name__


def test_a_killed_scheduler_ends_requests_and_server(own: Running) -> None:
    """Last of those that use `own`: it does not serve again.

    SGLang looks for dead workers once a second, then waits 5 seconds for its crash dump.
    """
    family = psutil.Process(own.server.process.pid).children(recursive=True)
    (scheduler,) = [child for child in family if "scheduler" in child.name()]
    whole = Client(own.url, False, "oea-k3")
    streams = [Client(own.url, True, policy) for policy in ("vanilla", "oea-k3")]
    whole.start()
    for stream in streams:
        stream.start()
    assert all(stream.has_begun.wait(60) for stream in streams)
    scheduler.kill()
    for client in (whole, *streams):
        client.join(60)
    status = own.server.process.wait(60)
    assert whole.outcome in ("RemoteProtocolError", "ReadError", "status 500", "status 503")
    assert {stream.outcome for stream in streams} <= {"RemoteProtocolError", "ReadError"}
    assert status != 0, "a supervisor would take this for an orderly end"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert "Subprocess scheduler_0" in own.server.log.read_text()


# --- a full disk -------------------------------------------------------------------------------


def calibrate(out: Path, *options: str, room: int | None = None) -> tuple[int, str]:
    """Status and stderr, in one line, of a calibration that can write files of `room` bytes only.

    Python ignores SIGXFSZ, so that a longer write fails with an error as on a full disk.
    """

    def limit() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    program = [sys.executable, "-m", "sglang_moe_routing", "calibrate", str(demo.MODEL)]
    done = subprocess.run(
        [*program, "--out", str(out), "--metric", "weights", *options],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("room", "unwritten"),
    [
        (200, "routing.safetensors.partial"),
        (8_000, "routing.safetensors.partial"),
        (40_000, "routing.safetensors"),
    ],
    ids=["state", "one matrix", "artifact"],
)
def test_a_full_disk_stops_a_calibration_that_can_go_on(
    tmp_path: Path, room: int, unwritten: str
) -> None:
    """What was there before stays whole, and with room the same command finishes."""
    out = tmp_path / "routing.safetensors"
    shutil.copy(SIMILARITY, out)
    status, stderr = calibrate(out, "--overwrite", room=room)
    assert status == 1
    assert "Traceback" not in stderr
    assert f"{tmp_path / unwritten}" in stderr
    assert "File too large" in stderr
    assert out.read_bytes() == SIMILARITY.read_bytes()
    status, stderr = calibrate(out, "--overwrite")
    assert status == 0, stderr
    assert load_artifact(out).metric == "weights"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


# --- kernels at start-up -----------------------------------------------------------------------


def flip(path: Path) -> None:
    """Damage that the loader does not notice."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 4
    content[middle : middle + 4096] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4096])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_a_damaged_library_of_kernels_is_not_loaded(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Without a compiler to make it anew the reference serves, or under `native` nothing."""
    chosen = native.choose("cpu")
    if not chosen.is_native:
        pytest.skip(chosen.reason)
    built = native.build_cpu()
    copy = tmp_path / "cache" / built.name
    shutil.copytree(built, copy)
    (library,) = copy.glob("*.so")
    damage(library)
    program = (
        "from sglang_moe_routing.kernels import choose; c = choose('cpu'); print(c.name, c.reason)"
    )

    def choose(kernels: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": str(tmp_path), native.CACHE: str(copy.parent)}
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**env, native.CHOICE: kernels},
            capture_output=True,
            text=True,
            check=False,
        )

    done = choose("auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch reference ")
    assert "no C++ compiler 'c++' on PATH" in done.stdout
    done = choose("native")
    assert done.returncode == 1
    assert "SGLANG_MOE_ROUTING_KERNELS=native, but " in done.stderr
