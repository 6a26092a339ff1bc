"""What SGLang's ``/metrics`` says of the routing, where the server runs with --enable-metrics.

Every process writes its own files in ``PROMETHEUS_MULTIPROC_DIR``; SGLang's endpoint adds all up
that it finds there.
Counts on the device are read by a thread of the scheduler at an interval, on a stream of its own:
the thread that runs the model never waits for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch

from ..errors import EngineError
from .process import Process
from .statistics import COLUMNS

logger = logging.getLogger(__name__)

PREFIX = "sglang_moe_routing_"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
REASONS = (
    "beam_search",
    "contradiction",
    "malformed",
    "not_allowed",
    "reserved",
    "session",
    "unknown",
    "unknown_api_key",
)
"""Why a request was refused; `RoutingRequestError.reason` is one of them."""


class Metric(NamedTuple):
    """One exported metric, without `PREFIX` and the ``_total`` of counters."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    mode: Literal["mostrecent", "min"] = "mostrecent"
    """Of a gauge: what its value is where several processes give one."""


_REQUESTS = Metric("requests", "counter", ("policy",), "Requests accepted, by policy.")
_REJECTED = Metric("rejected_requests", "counter", ("reason",), "Requests refused, by reason.")
_ROWS = Metric("rows", "counter", ("policy",), "Decode rows (tokens), by policy.")
_DISENGAGED = Metric(
    "disengaged_rows",
    "counter",
    ("policy", "reason"),
    "Decode rows whose policy did not act: fewer live rows than its min_rows, or more than its "
    "max_rows.",
)
_CALLS = Metric("moe_calls", "counter", (), "MoE layer calls in decode steps.")
_SLOTS = Metric("slots", "counter", (), "Routed expert slots of decode rows (rows x top-k).")
_MOVED = Metric("moved_slots", "counter", (), "Slots whose expert the row no longer uses.")
_ACTIVE = Metric("active_experts", "counter", (), "Distinct experts run (T), summed over calls.")
_BASE = Metric(
    "base_active_experts",
    "counter",
    (),
    "Distinct experts that the router had chosen (T_base), summed over calls.",
)
_CRITICAL = Metric(
    "critical_experts",
    "counter",
    (),
    "Active experts kept because nothing loaded could stand in for them, summed over calls.",
)
_KERNELS = Metric("kernels_info", "gauge", ("kernels", "experts"), "What re-routes and what runs.")
_READ = Metric(
    "counts_last_read_timestamp_seconds",
    "gauge",
    (),
    "When a scheduler's counts were last brought up to date, in Unix time: of several, the one "
    "that is furthest behind.",
    mode="min",
)
_HASH = Metric("config_hash", "gauge", (), "First 48 bits of the SHA-256 of the config in force.")
_SUCCESSFUL = Metric(
    "config_last_reload_successful", "gauge", (), "Whether the last reload took effect."
)
_TIME = Metric(
    "config_last_reload_success_timestamp_seconds",
    "gauge",
    (),
    "When the config in force was taken over, in Unix time.",
)
METRICS = (
    _REQUESTS,
    _REJECTED,
    _ROWS,
    _DISENGAGED,
    _CALLS,
    _SLOTS,
    _MOVED,
    _ACTIVE,
    _BASE,
    _CRITICAL,
    _KERNELS,
    _READ,
    _HASH,
    _SUCCESSFUL,
    _TIME,
)
"""Everything that is exported."""

_is_enabled = False


def enable(is_enabled: bool) -> None:
    """Whether this process exports. Called once SGLang's flags are known, in the main process.

    Raises:
        EngineError: the folder that the operator named for metrics cannot be used.
    """
    global _is_enabled
    if is_enabled and not _is_enabled and os.environ.get(FOLDER):
        _use_own_folder(os.environ[FOLDER])
    _is_enabled = is_enabled


_lock: IO[str] | None = None  # of this server's folder, until the process ends, however it does


def _use_own_folder(parent: str) -> None:
    """Write into a new folder below the one that the operator named, and remove those of the dead.

    The named one itself keeps the counts of servers that have ended, and others may be using it.
    """
    global _lock
    try:
        for lock in Path(parent).glob("server-*/lock"):
            _remove_unless_locked(lock)
        folder = Path(tempfile.mkdtemp(prefix="server-", dir=parent))
        _lock = (folder / "new").open("w")
        fcntl.flock(_lock, fcntl.LOCK_EX)
        (folder / "new").rename(folder / "lock")
    except OSError as error:
        raise EngineError(
            f"{FOLDER}={parent}: {error.strerror}; name a folder that exists and can be written "
            "to, or unset the variable"
        ) from None
    os.environ[FOLDER] = str(folder)


def _remove_unless_locked(lock: Path) -> None:
    with contextlib.suppress(OSError), lock.open() as file:  # locked, another user's, just removed
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent)


def count_request(policy: str) -> None:
    """Count a request that was accepted."""
    if _is_enabled:
        _make(_REQUESTS).labels(policy).inc()


def count_rejection(reason: str) -> None:
    """Count a request that was refused."""
    if _is_enabled:
        _make(_REJECTED).labels(reason).inc()


def show_config(sha256: str, choosable: Iterable[str]) -> None:
    """Say that a config has come into force; its series exist before something happens."""
    if _is_enabled:
        for policy in choosable:
            _make(_REQUESTS).labels(policy)
        for reason in REASONS:
            _make(_REJECTED).labels(reason)
        _make(_HASH).set(int(sha256[:12], 16))
        _make(_SUCCESSFUL).set(1)
        _make(_TIME).set(time.time())


def show_failed_reload() -> None:
    """Say that the last reload changed nothing."""
    if _is_enabled:
        _make(_SUCCESSFUL).set(0)


@functools.cache
def _make(metric: Metric, *more_labels: str) -> Any:
    """The metric of this process, made on first use: its library reads SGLang's environment."""
    from prometheus_client import Counter, Gauge

    name, labels = PREFIX + metric.name, (*metric.labels, *more_labels)
    if metric.kind == "counter":
        return Counter(name, metric.help, labels)
    return Gauge(name, metric.help, labels, multiprocess_mode=metric.mode)


class Exporter:
    """Publishes what a scheduler counts, at an interval.

    Made in the thread that runs the model: SGLang names a GPU without its index, which then is the
    current one of that thread.
    """

    def __init__(self, process: Process, device: torch.device) -> None:
        self._process = process
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._problem = ""
        self._labels = ("layer",) if process.config.metrics.per_layer else ()
        self._seen: dict[tuple[str, ...], int] = {}
        self._kernels: tuple[str, str] | None = None

    def start(self) -> None:
        """Begin in a thread that ends with the process."""
        threading.Thread(target=self._run, name="moe-routing-metrics", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._process.config.metrics.interval)
            self._try_to_publish()

    def _try_to_publish(self) -> None:
        """What goes wrong is logged once, and shows in the age of `_READ`."""
        try:
            if self._stream is not None:
                torch.cuda.set_stream(self._stream)  # its device, too
            model = self._process.model
            with model.reading:
                if model.has_run:
                    self.publish()
                    _make(_READ).set(time.time())
        except Exception as error:
            if repr(error) != self._problem:
                logger.exception("the MoE routing metrics are not brought up to date")
            self._problem = repr(error)
        else:
            self._problem = ""

    def _show_kernels(self, kernels: str, experts: str) -> None:
        """A reload may change what re-routes; series cannot be removed."""
        names = (kernels, experts)
        if self._kernels is not None and self._kernels != names:
            _make(_KERNELS).labels(*self._kernels).set(0)
        _make(_KERNELS).labels(*names).set(1)
        self._kernels = names

    def publish(self) -> None:
        """Add what has been counted since the last time."""
        model = self._process.model
        self._show_kernels(model.kernels, model.experts)
        for reason, total in dict.copy(self._process.rejections).items():
            self._add(_REJECTED, (reason,), total)
        counts = model.statistics
        if counts is None:
            return
        for policy, total in dict.copy(counts.rows.rows).items():
            self._add(_ROWS, (policy,), total)
        for labels, total in dict.copy(counts.rows.disengaged).items():
            self._add(_DISENGAGED, labels, total)
        totals = counts.totals()
        if self._labels:
            for layer, row in zip(model.layers, totals.tolist(), strict=True):
                self._add_experts(row, row[1] * layer.top_k, (str(layer.layer_id),))
        else:
            top_k = torch.tensor([layer.top_k for layer in model.layers])
            self._add_experts(totals.sum(0).tolist(), int((totals[:, 1] * top_k).sum()), ())

    def _add_experts(self, row: list[int], num_slots: int, labels: tuple[str, ...]) -> None:
        sums = dict(zip(COLUMNS, row, strict=True))
        self._add(_CALLS, labels, sums["calls"])
        self._add(_SLOTS, labels, num_slots)
        self._add(_MOVED, labels, sums["moved_slots"])
        self._add(_ACTIVE, labels, sums["active_experts"])
        self._add(_BASE, labels, sums["active_experts_base"])
        self._add(_CRITICAL, labels, sums["critical_experts"])

    def _add(self, metric: Metric, labels: tuple[str, ...], total: int) -> None:
        key = (metric.name, *labels)
        more = self._labels if not metric.labels else ()
        counter = _make(metric, *more)
        child = counter.labels(*labels) if labels else counter
        seen = self._seen.get(key, 0)
        child.inc(total - seen if total >= seen else total)  # a new capture counts from 0 again
        self._seen[key] = total
