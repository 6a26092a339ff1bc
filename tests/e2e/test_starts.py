"""Every way of starting SGLang serves the configured policies, or does not serve."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import free_port, server_environment, stop_server

from .conftest import HEADER, Running

FLAGS: Mapping[str, Any] = {
    "model_path": str(demo.MODEL),
    "served_model_name": "demo",
    "random_seed": 0,
    "max_total_tokens": 4096,
    "skip_server_warmup": True,
}

SCRIPT = """
import json, os, signal, sys, time
import httpx

HEADER = "X-MoE-Routing-Policy"


def ask(url, config):
    http = httpx.Client(base_url=url, timeout=120)
    body = {"prompt": "It was", "max_tokens": 2, "temperature": 0}

    def complete(model, **headers):
        answer = http.post("/v1/completions", json={"model": model, **body}, headers=headers)
        return [answer.status_code, answer.headers.get(HEADER)]

    found = {
        "alias": complete("demo@oea-k3"),
        "header": complete("demo", **{HEADER: "topk-k3"}),
        "unknown": complete("demo@nope"),
        "default": complete("demo"),
        "policies": len(http.get("/v1/moe_routing/policies").json()["data"]),
        "statistics": http.get("/v1/moe_routing/statistics").status_code,
    }
    metrics = [line.split() for line in http.get("/metrics").text.splitlines()]
    wanted = 'sglang_moe_routing_requests_total{policy="topk-k3"}'
    found["counted"] = [words[1] for words in metrics if words[0] == wanted]
    config.write_text(config.read_text().replace("private:", "renamed:"))
    found["reload"] = http.post("/moe_routing/reload").status_code
    config.write_text(config.read_text().replace("renamed:", "private:"))
    return found


if __name__ == "__main__":
    from pathlib import Path
    import sglang
    from sglang.srt.entrypoints.http_server_engine import HttpServerEngineAdapter

    flags, config = json.loads(sys.argv[1]), Path(sys.argv[2])
    for name, kind in (("adapter", HttpServerEngineAdapter), ("runtime", sglang.Runtime)):
        server = kind(**flags, enable_metrics=True)
        url = f"http://127.0.0.1:{server.server_args.port}"
        print("FOUND", json.dumps({name: ask(url, config)}), flush=True)
        server.shutdown()
        flags.pop("port", None)  # `Runtime` looks for one itself, but only below 40000
"""

FUNCTION = """
import json, sys

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**json.loads(sys.argv[1])))
"""

DUMMY = """
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate():
    return "dummy_platform.DummyPlatform"


class DummyPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = device_type = "cpu"

    def get_device(self, device_id=0):
        return "cpu"

    def apply_server_args_defaults(self, server_args):
        server_args.attention_backend = "torch_native"
        server_args.cuda_graph_backend_decode = "disabled"
"""


def run(
    folder: Path, config: Path, command: Sequence[str], **environment: str
) -> tuple[int, str, float]:
    """Run Python with `command` until it ends: status, output, seconds."""
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    env = server_environment(config, cpu=True, base=base) | environment
    begin = time.monotonic()
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=400)
        finally:
            stop_server(process)
    return status, (folder / "log").read_text(), time.monotonic() - begin


def test_servers_that_scripts_start_serve_the_policies(tmp_path: Path, config: Path) -> None:
    """Both call `launch_server` as a function: one in a fork, one in a fresh process."""
    own = tmp_path / "routing.yaml"
    own.write_text(config.read_text() + "reload: {http: open}\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    flags = json.dumps({**FLAGS, "port": free_port()})
    _, output, _ = run(tmp_path, own, [str(tmp_path / "script.py"), flags, str(own)])
    found = [json.loads(line) for line in re.findall(r"^FOUND (.*)$", output, re.MULTILINE)]
    expected = {
        "alias": [200, "oea-k3"],
        "header": [200, "topk-k3"],
        "unknown": [400, None],
        "default": [200, "vanilla"],
        "policies": 13,
        "statistics": 200,
        "counted": ["1.0"],
        "reload": 200,
    }
    assert found == [{"adapter": expected}, {"runtime": expected}], output[-4000:]


def test_launch_server_as_a_function_ends_where_a_scheduler_refuses(tmp_path: Path) -> None:
    config = tmp_path / "routing.yaml"
    config.write_text("version: 1\npolicies: {fast: {kind: oea, k0: 9}}\n")
    (tmp_path / "script.py").write_text(FUNCTION)
    flags = json.dumps({**FLAGS, "port": free_port()})
    status, output, _ = run(tmp_path, config, [str(tmp_path / "script.py"), flags])
    assert status == 78, output[-4000:]
    assert "policies.fast.k0: 9 exceeds the model's top_k of 8" in output
    assert "MainProcess: cannot serve: a scheduler process refused to start" in output


def test_launch_server_as_a_function_refuses_unsupported_flags(
    tmp_path: Path, config: Path
) -> None:
    (tmp_path / "script.py").write_text(FUNCTION)
    flags = json.dumps({**FLAGS, "port": free_port(), "tokenizer_worker_num": 2})
    status, output, _ = run(tmp_path, config, [str(tmp_path / "script.py"), flags])
    assert status != 0
    assert "EngineError: not supported together with MoE routing policies" in output
    assert "Load weight begin" not in output


def test_python_m_launch_server_serves_and_ctrl_c_ends_it_quietly(
    tmp_path: Path, config: Path
) -> None:
    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    flags = [flag.removesuffix("=True") for flag in flags]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *flags, "--port", str(port)],
            env=server_environment(config, cpu=True, base={**os.environ, "OMP_NUM_THREADS": "1"}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "in force" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.2)
        time.sleep(1)  # the port opens right after
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": "demo@oea-k3", "prompt": "It was", "max_tokens": 2},
            timeout=120,
        )
        assert (answer.status_code, answer.headers[HEADER]) == (200, "oea-k3")
        before = log.stat().st_size
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=60) == 130
    finally:
        stop_server(process)
    after = log.read_bytes()[before:].decode()
    assert "Traceback" not in after, after


def test_a_server_says_its_policies_and_how_to_reload_them(served: Running) -> None:
    log = served.server.log.read_text()
    assert "MoE routing policies in force: vanilla, oea-k3, oea-k2, topk-k3" in log
    assert f"kill -HUP {served.server.process.pid}" in log


def test_a_port_in_use_ends_the_start_before_the_model_is_loaded(
    tmp_path: Path, config: Path, served: Running
) -> None:
    port = served.url.rpartition(":")[2]
    flags = ["--model-path", str(demo.MODEL), "--port", port]
    status, output, _ = run(tmp_path, config, ["-m", "sglang.launch_server", *flags])
    assert status == 78, output[-4000:]
    assert f"cannot serve: port {port} of 127.0.0.1 is in use by another process" in output
    assert "Load weight begin" not in output


def test_a_platform_of_another_package_stops_the_server(tmp_path: Path, config: Path) -> None:
    """SGLang skips all plugins of a distribution that brings a platform which is not selected."""
    (tmp_path / "dummy_platform.py").write_text(DUMMY)
    info = tmp_path / "dummy_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.platforms]\ndummy = dummy_platform:activate\n"
    )
    (tmp_path / "script.py").write_text(FUNCTION)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    flags = json.dumps({**FLAGS, "port": free_port()})
    status, output, _ = run(
        tmp_path,
        config,
        [str(tmp_path / "script.py"), flags],
        SGLANG_PLATFORM="dummy",
        PYTHONPATH=path,
    )
    assert status == 78, output[-4000:]
    assert "SGLang runs on the platform dummy_platform.DummyPlatform" in output
