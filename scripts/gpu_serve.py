"""What `gpu_check.py` asks of running servers: graphs, mixed policies, metrics, reload, groups.

T, the number of experts that a call runs, is held to what the rules say of it: alone, a request
under k0 = 3 runs three experts in every layer; and no batch runs more than its budget.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sglang_moe_routing import demo, environment
from sglang_moe_routing.serving.server import Server, running_server

HEADER = "X-MoE-Routing-Policy"
PREFIX = "sglang_moe_routing_"
NUM_LAYERS, TOP_K = 4, 8  # of the demo model
NUM_TOKENS = 16
LONG = 64  # tokens, for requests that shall meet in one batch
BUDGET = 12
SETTLE_S = 30
POLICIES = ("vanilla", "topk", "oea", "sere", "budget")
CONFIG = f"""
version: 1
clients_may_choose: [{", ".join(POLICIES)}]
reload: {{http: open}}
metrics: {{interval: 0.2}}
similarity: {{demo: {demo.CONFIG.with_name("similarity.safetensors")}}}
policies:
  topk: {{kind: topk, k0: 3}}
  oea: {{kind: oea, k0: 3}}
  sere: {{kind: sere, num_primary: 3, threshold: 0.2}}
  budget: {{kind: budget, max_active: {BUDGET}}}
"""
GROUPS = "isolation: {policies: {topk: a, oea: b, budget: c}}\n"
GRAPHS = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16")
EMULATED = ("--enable-torch-compile", "--cuda-graph-backend-prefill", "disabled")

Values = Mapping[tuple[str, ...], float]


class WrongError(AssertionError):
    """A server does not do what it should."""


def expect(is_true: bool, what: str, found: object) -> None:
    if not is_true:
        raise WrongError(f"{what}, found {found!r}")


@dataclass(frozen=True)
class Counted:
    """What was counted between two readings of ``/metrics``, layers together."""

    requests: dict[str, float]
    rows: dict[str, float]
    calls: float
    slots: float
    moved: float
    active: float
    base: float

    @property
    def batch(self) -> float:
        """Rows of a step."""
        return sum(self.rows.values()) * NUM_LAYERS / self.calls

    @property
    def figures(self) -> dict[str, float]:
        """Means over calls."""
        return {
            "T": round(self.active / self.calls, 3),
            "T_base": round(self.base / self.calls, 3),
            "rows": round(sum(self.rows.values())),
            "batch": round(self.batch, 1),
            "moved": round(self.moved / self.slots, 3),
        }


class Client:
    """Sends requests, and reads what the server counts."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._http = httpx.Client(base_url=server.url, timeout=120)
        self._prompts = demo.read_prompts()

    def count(self, policies: Sequence[str], num_tokens: int = NUM_TOKENS) -> Counted:
        """What is counted for requests under `policies`, all at once; the counts are checked."""
        before = self._read()
        with ThreadPoolExecutor(len(policies)) as pool:
            list(pool.map(self._generate, policies, range(len(policies)), repeat(num_tokens)))
        after = self._read()
        counted = _difference(before, after)
        asked = {name: float(policies.count(name)) for name in set(policies)}
        rows = {name: number * (num_tokens - 1) for name, number in asked.items()}
        expect(counted.requests == asked, f"requests by policy {asked}", counted.requests)
        expect(counted.rows == rows, f"decode rows by policy {rows}", counted.rows)
        slots = sum(rows.values()) * NUM_LAYERS * TOP_K
        expect(counted.slots == slots, f"{slots} slots: none of padded rows", counted.slots)
        expect(counted.active <= counted.base, "T of at most T_base", counted)
        self._agree_with_statistics(after)
        return counted

    def alone(self, policy: str, num_experts: int) -> dict[str, float]:
        """One request by itself must run `num_experts` experts a layer, of the model's top-k."""
        counted = self.count([policy])
        steps = (NUM_TOKENS - 1) * NUM_LAYERS
        expect(counted.calls == steps, f"{steps} calls", counted.calls)
        wanted = float(num_experts * steps)
        expect(counted.active == wanted, f"T = {num_experts} under {policy}", counted.figures)
        expect(counted.base == TOP_K * steps, f"T_base = {TOP_K}", counted.figures)
        return counted.figures

    def reload(self) -> int:
        return self._http.post("/moe_routing/reload").status_code

    def get(self, path: str) -> Any:
        return self._http.get(path).raise_for_status().json()

    @property
    def decodes_in_graphs(self) -> bool:
        """What SGLang's log says of decode steps."""
        return "cuda graph: True" in self._server.log.read_text(errors="replace")

    def _generate(self, policy: str, number: int, num_tokens: int) -> None:
        params = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body = {"text": self._prompts[number % len(self._prompts)], "sampling_params": params}
        answer = self._http.post("/generate", json=body, headers={HEADER: policy})
        expect(answer.status_code == 200, "status 200", answer.text[:500])
        said = answer.headers.get(HEADER), answer.json()["meta_info"]["moe_routing_policy"]
        expect(said == (policy, policy), f"{policy} applied", said)

    def _read(self) -> Values:
        """Values by name and labels, as they are once everything so far has been counted."""
        asked = time.time()
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            values = self._scrape()
            if values.get(("counts_last_read_timestamp_seconds",), 0) > asked:
                return values
            time.sleep(0.1)
        raise WrongError(f"counts were not read in {SETTLE_S} s; the log says why")

    def _scrape(self) -> Values:
        text = self._http.get("/metrics", follow_redirects=True).text
        return {
            (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(PREFIX)
        }

    def _agree_with_statistics(self, values: Values) -> None:
        """The counts of ``/v1/moe_routing/statistics`` are those of ``/metrics``."""
        (statistics,) = self.get("/v1/moe_routing/statistics")["data"]
        for key, name in (
            ("calls", "moe_calls_total"),
            ("active_experts", "active_experts_total"),
            ("active_experts_base", "base_active_experts_total"),
            ("moved_slots", "moved_slots_total"),
        ):
            total = sum(layer[key] for layer in statistics["layers"])
            expect(values[name,] == total, f"{name} {total}, as in the statistics", values[name,])


def _difference(before: Values, after: Values) -> Counted:
    def added(name: str) -> float:
        return after[name,] - before.get((name,), 0)

    def by_policy(name: str) -> dict[str, float]:
        found = {k[1]: v - before.get(k, 0) for k, v in after.items() if k[0] == name}
        return {policy: number for policy, number in found.items() if number}

    return Counted(
        requests=by_policy("requests_total"),
        rows=by_policy("rows_total"),
        calls=added("moe_calls_total"),
        slots=added("slots_total"),
        moved=added("moved_slots_total"),
        active=added("active_experts_total"),
        base=added("base_active_experts_total"),
    )


@contextlib.contextmanager
def serving(
    config: str, *, cpu: bool, flags: Sequence[str]
) -> Iterator[tuple[Client, Path, dict[str, Any]]]:
    """A client of a server with graphs and metrics, its config, and figures about it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routing.yaml"
        path.write_text(config)
        settings = {environment.EMULATE_GRAPHS: "1"} if cpu else {}
        start = time.monotonic()
        with running_server(
            demo.MODEL,
            config=path,
            flags=["--enable-metrics", *GRAPHS, *(EMULATED if cpu else ()), *flags],
            environment=settings,
            log=Path(folder) / "server.log",
            cpu=cpu,
        ) as server:
            client = Client(server)
            client.count(["vanilla"])  # so that the series are there
            (statistics,) = client.get("/v1/moe_routing/statistics")["data"]
            kernels = statistics["kernels"]
            expect(kernels.startswith("cpu" if cpu else "cuda"), "compiled kernels", kernels)
            figures: dict[str, Any] = {
                "start_s": round(time.monotonic() - start, 1),
                "kernels": kernels,
            }
            yield client, path, figures
            if not cpu:  # emulated ones are not called so
                expect(client.decodes_in_graphs, "decode steps in graphs", "none in the log")


def check_graphs(*, cpu: bool, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Decode graphs, policies by header in one batch, T from ``/metrics``, a reload.

    Raises:
        WrongError: what is not as it should be.
    """
    with serving(CONFIG, cpu=cpu, flags=flags) as (client, path, figures):
        figures["alone"] = {
            "vanilla": client.alone("vanilla", TOP_K),
            "topk": client.alone("topk", 3),
            "oea": client.alone("oea", 3),
        }
        budget = client.count(["budget"] * 16)
        expect(budget.active <= BUDGET * budget.calls, f"T <= {BUDGET}", budget.figures)
        padded = client.count(["topk"] * 5)
        most = 3 * NUM_LAYERS * sum(padded.rows.values())
        expect(padded.active <= most, "no expert of padded rows", padded.figures)
        mixed = client.count([POLICIES[i % len(POLICIES)] for i in range(16)], LONG)
        expect(mixed.batch > len(POLICIES), "policies in one batch", mixed.figures)
        expect(mixed.active < mixed.base, "a saving", mixed.figures)
        figures |= {"budget": budget.figures, "padded": padded.figures, "mixed": mixed.figures}
        figures["reload"] = _check_reload(client, path)
    return figures


def _check_reload(client: Client, path: Path) -> dict[str, Any]:
    """A new definition is in force in the graphs that were captured under the old one."""
    path.write_text(CONFIG.replace("kind: topk, k0: 3", "kind: topk, k0: 2"))
    start = time.monotonic()
    status = client.reload()
    seconds = time.monotonic() - start
    expect(status == 200, "status 200", status)
    after = client.alone("topk", 2)
    client.alone("oea", 3)
    path.write_text("version: 1\npolicies: {topk: nonsense}\n")
    status = client.reload()
    expect(status == 400, "status 400 for a config that is not valid", status)
    client.alone("topk", 2)
    return {"seconds": round(seconds, 3), "topk": after}


def check_groups(*, cpu: bool, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Isolation groups under graphs: a policy's rows see those of their own group only.

    Raises:
        WrongError: what is not as it should be.
    """
    with serving(CONFIG + GROUPS, cpu=cpu, flags=flags) as (client, _, figures):
        figures["alone"] = {"topk": client.alone("topk", 3), "oea": client.alone("oea", 3)}
        pair = client.count(["topk", "oea"])  # oea would use topk's experts, were they one group
        moved = pair.slots * (TOP_K - 3) / TOP_K
        expect(pair.moved == moved, f"{moved} moved slots: 3 experts a row", pair.figures)
        mixed = client.count([POLICIES[i % len(POLICIES)] for i in range(15)], LONG)
        expect(mixed.batch > len(POLICIES), "policies in one batch", mixed.figures)
        expect(mixed.active < mixed.base, "a saving", mixed.figures)
        figures |= {"pair": pair.figures, "mixed": mixed.figures}
    return figures
