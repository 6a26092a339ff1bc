"""How counts become metrics, and the thread that reads them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.runtime import process

pytest.importorskip("sglang")
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_moe_routing.integration.hooks.model import forward_batch, graphs
from sglang_moe_routing.kernels import REFERENCE, Implementation
from sglang_moe_routing.runtime import Process, metrics

from .test_isolation import make_runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # without index, as SGLang names it


NAMES = ("before", "after")


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Process]:
    runtime = make_runtime(tmp_path, 1, "torch")
    runtime.config = runtime.config.model_copy(
        update={"metrics": runtime.config.metrics.model_copy(update={"interval": 0.05})}
    )
    runtime.model.has_run = True
    yield runtime
    runtime.model.has_run = False  # its threads have nothing to do any more
    with runtime.model.reading:
        pass


def last_read() -> float:
    return metrics._make(metrics._READ)._value.get()


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_there()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_without_index_is_the_current_one_of_the_main_thread(
    runtime: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of CUDA is made here, where it ends the start, and not by the thread."""
    with pytest.raises(RuntimeError, match=r"exchangeDevice|NVIDIA"):
        metrics.Exporter(runtime, GPU)
    used: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", used.append)
    start = time.time()
    metrics.Exporter(runtime, GPU).start()
    wait_for(lambda: last_read() > start)
    assert set(used) == {"stream of cuda"}


def test_what_re_routes_follows_a_reload(runtime: Process) -> None:
    """The series of what did so before stays, at 0."""
    exporter, gauge = metrics.Exporter(runtime, CPU), metrics._make(metrics._KERNELS)
    for name in (*NAMES, "before"):
        runtime.model._implementation = Implementation("", name)
        exporter.publish()
        series = {n: gauge.labels(f"{REFERENCE}: {n}", runtime.model.experts) for n in NAMES}
        values = {n: one._value.get() for n, one in series.items()}
        assert values == dict.fromkeys(NAMES, 0) | {name: 1}


def test_a_thread_that_cannot_read_says_so_once_and_goes_on(
    runtime: Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[None] = []

    def fail() -> Any:
        tries.append(None)
        raise RuntimeError("no such stream")

    start = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(runtime.model.statistics, "totals", fail)
        metrics.Exporter(runtime, CPU).start()
        wait_for(lambda: len(tries) >= 4)
        (record,) = caplog.records
        assert "not brought up to date" in record.message
        assert "no such stream" in caplog.text
        assert last_read() < start
    wait_for(lambda: last_read() > start)


def test_counts_are_read_from_the_first_batch_on_one_without_decode_too(
    runtime: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where requests generate one token each, the counts must not look as if nobody read them."""
    monkeypatch.setattr(process, "_current", runtime)
    runtime.model.has_run = False
    start = time.time()
    metrics.Exporter(runtime, CPU).start()
    time.sleep(0.3)
    assert last_read() < start
    prefill = SimpleNamespace(forward_mode=ForwardMode.EXTEND, reqs=[], extend_lens=[])
    runner = SimpleNamespace(is_draft_worker=False)
    forward_batch.after(SimpleNamespace(batch_size=0), object, prefill, runner)
    wait_for(lambda: last_read() > start)


def test_graphs_are_not_captured_while_the_thread_reads(
    runtime: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA would call the capture invalid."""
    monkeypatch.setattr(process, "_current", runtime)
    is_reading, may_end = threading.Event(), threading.Event()
    is_captured = threading.Event()
    runner = SimpleNamespace(model_runner=SimpleNamespace(is_draft_worker=False))
    totals = runtime.model.statistics.totals

    def read() -> Any:
        is_reading.set()
        assert may_end.wait(20)
        assert runtime.model._step is None
        return totals()

    def capture() -> None:
        with contextlib.suppress(EngineError):  # no layer asks for its routing here
            graphs.around_capture(lambda runner: is_captured.set(), runner)

    monkeypatch.setattr(runtime.model.statistics, "totals", read)
    start = time.time()
    metrics.Exporter(runtime, CPU).start()
    assert is_reading.wait(20)
    capturing = threading.Thread(target=capture)
    capturing.start()
    assert not is_captured.wait(0.3)
    may_end.set()
    capturing.join(20)
    assert is_captured.is_set()
    wait_for(lambda: last_read() > start)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an operator names for metrics."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    monkeypatch.setattr(metrics, "_is_enabled", False)
    return tmp_path


def collect() -> dict[str, float]:
    """What SGLang's endpoint finds: name and value."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return {s.name: s.value for family in registry.collect() for s in family.samples}


def test_counts_of_a_dead_server_are_not_continued(folder: Path) -> None:
    """As after SIGKILL, with the same PROMETHEUS_MULTIPROC_DIR."""
    program = (
        "import os, prometheus_client as p\n"
        "p.Counter('served', 'x').inc(5)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert collect() == {"served_total": 5}
    metrics.enable(True)
    assert collect() == {}
    assert Path(os.environ[metrics.FOLDER]).parent == folder
    assert list(folder.glob("counter_*.db"))  # they may be those of a server that lives


def test_servers_that_share_a_folder_do_not_add_up(folder: Path) -> None:
    """The folder of one that lives stays, that of one that was killed goes."""
    program = (
        "import os, sys\n"
        "from sglang_moe_routing.runtime import metrics\n"
        "metrics.enable(True)\n"
        "metrics.count_request('fast')\n"
        "print(os.environ[metrics.FOLDER], flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        first = Path(server.stdout.readline().strip())
        assert first.parent == folder
        metrics.enable(True)
        second = Path(os.environ[metrics.FOLDER])
        assert collect() == {}
        metrics.enable(True)  # once more in the same process
        assert Path(os.environ[metrics.FOLDER]) == second
        assert {p.name for p in folder.iterdir()} == {first.name, second.name}
        server.kill()
    metrics._use_own_folder(str(folder))
    assert not first.exists()
    assert Path(os.environ[metrics.FOLDER]).is_dir()


def test_a_folder_for_metrics_that_is_missing_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.FOLDER, str(folder / "none"))
    with pytest.raises(EngineError, match=r"PROMETHEUS_MULTIPROC_DIR=.*none: No such file"):
        metrics.enable(True)


def test_a_count_that_begins_anew_goes_on_adding() -> None:
    """As after graphs are captured again; a Prometheus counter cannot fall."""
    runtime = SimpleNamespace(config=SimpleNamespace(metrics=SimpleNamespace(per_layer=False)))
    exporter = metrics.Exporter(runtime, CPU)
    counter = metrics._make(metrics._CALLS)
    start = counter._value.get()
    for total in (10, 12, 3, 4):
        exporter._add(metrics._CALLS, (), total)
    assert counter._value.get() - start == 12 + 4
