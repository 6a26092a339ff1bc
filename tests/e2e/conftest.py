"""Real servers that the end-to-end tests share: a start takes 20 to 60 seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_moe_routing import demo, environment
from sglang_moe_routing.artifacts import load_artifact
from sglang_moe_routing.serving.server import Server, running_server
from sglang_moe_routing.testing import read_records

HEADER = "X-MoE-Routing-Policy"

CONFIG = f"""
version: 1
clients_may_choose: [oea-k3, oea-k2, topk-k3, sere-s2, late, everywhere, same-as-oea-k3, budget-20,
  xshare-24, lynx-24, mapped, vanilla]
similarity:
  demo: {demo.CONFIG.with_name("similarity.safetensors")}
policies:
  oea-k3: {{kind: oea, k0: 3}}
  oea-k2: {{kind: oea, k0: {{default: 2, layers: {{"1": 4}}}}, p: 0.9, k_max: 6, max_rank: 32}}
  topk-k3: {{kind: topk, k0: 3}}
  sere-s2: {{kind: sere, num_primary: 2, threshold: 0.2}}
  late: {{kind: oea, k0: {{default: 5, rows: {{6: 2}}}}, engage: {{min_rows: 4}}}}
  everywhere: {{kind: topk, k0: 2, engage: {{phase: all, layers: "0,2-3"}}}}
  same-as-oea-k3: {{kind: oea, k0: 3}}
  budget-20: {{kind: budget, max_active: 20, compensation: 0.6}}
  xshare-24: {{kind: xshare, max_active: 24}}
  lynx-24: {{kind: lynx, max_active: 24, compensation: 0.5}}
  mapped: {{kind: oea, k0: 2, mapped_share: 0.3}}
  private: {{kind: topk, k0: 1}}
"""

RULES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "oea-k3": {"k0": 3},
    "same-as-oea-k3": {"k0": 3},
    "topk-k3": {"k0": 3, "k_max": 3},
    "sere-s2": {"k0": 2, "threshold": 0.2},
    "budget-20": {"k0": 0, "max_active": 20, "compensation": 0.6},
    "xshare-24": {"k0": 1, "max_active": 24, "exponent": 1},
    "lynx-24": {"k0": 0, "max_active": 24, "exponent": 0, "max_rank": 8, "compensation": 0.5},
    "mapped": {"k0": 2, "mapped_share": 0.3},
}
"""Policies of CONFIG whose rule depends on neither layer nor live rows, as the papers have it."""


def rule_of(name: str, layer: int, num_live: int) -> dict[str, Any]:
    """The rule of policy `name` of CONFIG on `layer` with `num_live` live rows."""
    if name == "oea-k2":
        return {"k0": 4 if layer == 1 else 2, "p": 0.9, "k_max": 6, "max_rank": 32}
    if name == "late":
        return {} if num_live < 4 else {"k0": 2 if num_live >= 6 else 5}
    if name == "everywhere":
        return {} if layer == 1 else {"k0": 2, "k_max": 2}
    return RULES[name]


@dataclass
class Running:
    """A running server, the folder that its recorder fills while it exists, and its config."""

    server: Server
    records: Path
    config: Path | None = None

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300)

    def record(self, work: Callable[[], Any]) -> list[dict[str, Any]]:
        """Every MoE call that the engine makes during `work`."""
        self.records.mkdir()
        try:
            work()
            return list(read_records(self.records))
        finally:
            for path in self.records.iterdir():
                path.unlink()
            self.records.rmdir()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with every kind of policy for the demo model."""
    path = tmp_path_factory.mktemp("config") / "routing.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def similarity() -> dict[int, np.ndarray]:
    """The demo's similarity matrices by layer."""
    matrices = load_artifact(demo.CONFIG.with_name("similarity.safetensors")).matrices
    return {layer: matrix.float().numpy() for layer, matrix in matrices.items()}


@pytest.fixture(scope="session")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with the experts of every layer in another order: the same function."""
    folder = tmp_path_factory.mktemp("permuted") / "model"
    shutil.copytree(demo.MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(demo.MODEL / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = {}
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            moved[name] = tensor[order].contiguous()
        elif ".mlp.experts." in name:
            head, _, tail = name.partition(".mlp.experts.")
            place, _, part = tail.partition(".")
            moved[name] = tensors[f"{head}.mlp.experts.{order[int(place)]}.{part}"]
        else:
            moved[name] = tensor
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Context manager factory: a server on the demo model."""

    def start_server(config: Path | None, *flags: str, **settings: str) -> Any:
        return _running(tmp_path_factory.mktemp("server"), config, flags, settings)

    return start_server


class _running:  # noqa: N801  # used as a context manager function
    def __init__(
        self, folder: Path, config: Path | None, flags: tuple[str, ...], settings: dict[str, str]
    ) -> None:
        self._records, self._config = folder / "records", config
        self._context = running_server(
            demo.MODEL,
            config=config,
            flags=["--served-model-name", "demo", "--random-seed", "0", *flags],
            environment={
                "OMP_NUM_THREADS": "1",
                environment.RECORD: str(self._records),
                **settings,
            },
            log=folder / "server.log",
            cpu=True,
        )

    def __enter__(self) -> Running:
        return Running(self._context.__enter__(), self._records, self._config)

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


@pytest.fixture(scope="session")
def served(start: Callable[..., Any], config: Path) -> Iterator[Running]:
    """The server that most tests share."""
    with start(config, "--enable-custom-logit-processor") as running:
        yield running


@pytest.fixture(scope="session")
def plain(start: Callable[..., Any]) -> Iterator[Running]:
    """A server without this package."""
    with start(None) as running:
        yield running
