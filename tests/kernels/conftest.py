"""Everything that can re-route a call, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_moe_routing import kernels
from sglang_moe_routing.kernels import native
from sglang_moe_routing.policies import PAD, FreeSlots, PolicyTable, Rerouted, Router, reroute
from tests.cases import Case, assert_close, policy_ids, table_of
from tests.kernels import building
from tests.kernels.driver import Driver, Outcome, apart, assert_gaps_untouched, build_driver

NUM_STATISTICS = 6


@dataclass(frozen=True)
class Call:
    """One call as an implementation takes it. Without `gates` the scores are router logits."""

    scores: Tensor
    policy_ids: Tensor
    table: PolicyTable
    router: Router
    topk_ids: Tensor
    topk_weights: Tensor
    gates: Tensor | None = None
    free_slots: FreeSlots = FreeSlots.IGNORED
    seed: int = 0
    """Order of threads on the simulator."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("scores", "topk_ids", "topk_weights", "gates")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def laid_out(self, layout: Callable[[Tensor], Tensor]) -> Call:
        """The same call with its matrices laid out differently in memory."""
        changes: dict[str, Any] = {name: layout(x) for name, x in self.tensors.items()}
        return replace(self, **changes)


def call_of(case: Case, *, seed: int = 0, table: PolicyTable | None = None) -> Call:
    return Call(
        scores=case.scores,
        policy_ids=policy_ids(case, torch.int32),
        table=table_of(case) if table is None else table,
        router=Router(renormalize=case.renormalize, scale=case.scale),
        topk_ids=case.topk_ids,
        topk_weights=case.topk_weights,
        gates=case.gates,
        seed=seed,
    )


class Implementation(Protocol):
    """Runs calls. `out_gap` and `in_place` ask for outputs whose rows lie apart, or which are the
    inputs themselves."""

    def __call__(self, call: Call, *, out_gap: int = 0, in_place: bool = False) -> Outcome: ...


# --- the reference -----------------------------------------------------------------------------


def engine_choice(
    scores: Tensor, gates: Tensor, top_k: int, router: Router
) -> tuple[Tensor, Tensor]:
    """What a model chooses: a stable top-k, NaN last, and its weights."""
    is_nan = scores.isnan().numpy()
    falling = np.where(is_nan, 0.0, -scores.numpy())
    order = np.lexsort((falling, is_nan), axis=1)  # stable; the last key counts first
    ids = torch.from_numpy(order[:, :top_k].copy())
    weights = gates.gather(1, ids)
    if router.renormalize:
        total = weights.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, weights / total, weights)
    return ids.int(), weights * router.scale


def ask_reference(call: Call) -> Outcome:
    """The plain-torch reference."""
    router, scores = call.router, call.scores.float()
    ids, weights, gates = call.topk_ids, call.topk_weights, call.gates
    if gates is None:
        scores, gates = router.score(scores, ids)
    plan, renormalize, scale = call.policy_ids, router.renormalize, router.scale
    got = reroute(
        scores,
        gates,
        ids,
        weights,
        plan,
        call.table,
        renormalize=renormalize,
        scale=scale,
        free_slots=call.free_slots,
    )
    return as_outcome(got, int((plan != PAD).sum()))


def as_outcome(got: Rerouted, num_live: int) -> Outcome:
    counts = (got.active, got.active_base, got.moved_slots, got.critical)
    return Outcome(
        topk_ids=got.topk_ids,
        topk_weights=got.topk_weights,
        union=got.union,
        statistics=[int(num_live > 0), num_live, *(int(count) for count in counts)],
        num_launches=0,
    )


class Reference:
    """The plain-torch reference, which knows of no output tensors."""

    def __call__(self, call: Call, *, out_gap: int = 0, in_place: bool = False) -> Outcome:
        return ask_reference(call)


def assert_agrees(got: Outcome, expected: Outcome) -> None:
    """Two implementations: ids and counts exact, weights to rounding."""
    assert got.topk_ids.tolist() == expected.topk_ids.tolist()
    assert torch.equal(got.union, expected.union)
    assert got.statistics == expected.statistics
    assert_close(got.topk_weights, expected.topk_weights)


# --- compiled code -----------------------------------------------------------------------------


class Compiled:
    """The compiled functions on one kind of device, which know of no outputs but the inputs."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, call: Call, *, out_gap: int = 0, in_place: bool = False) -> Outcome:
        if out_gap:
            call = replace(
                call,
                topk_ids=apart(call.topk_ids, out_gap),
                topk_weights=apart(call.topk_weights, out_gap),
            )
        table = call.table.to(self.device)
        call = replace(call.laid_out(self.place), router=self.place_router(call.router))
        call = replace(call, policy_ids=call.policy_ids.to(self.device))
        if out_gap or in_place:
            return self._run_in_place(call, table)
        statistics = torch.zeros(NUM_STATISTICS, dtype=torch.int64, device=self.device)
        outputs = kernels.refine(
            call.scores,
            call.topk_ids,
            call.topk_weights,
            call.policy_ids,
            table,
            call.router,
            gates=call.gates,
            statistics=statistics,
            free_slots=call.free_slots,
        )
        ids, weights, union = (tensor.cpu() for tensor in outputs)
        return Outcome(ids, weights, union, statistics.tolist(), num_launches=0)

    def _run_in_place(self, call: Call, table: PolicyTable) -> Outcome:
        """As a server calls: all that does not change is bound to the layer before."""
        ids, weights, router = call.topk_ids, call.topk_weights, call.router
        union = torch.ones(call.scores.shape[1], dtype=torch.bool, device=self.device)
        statistics = torch.zeros(3, NUM_STATISTICS, dtype=torch.int64, device=self.device)
        layer = kernels.BoundLayer(
            table,
            router,
            union,
            top_k=ids.shape[1],
            statistics=statistics,
            workspace=kernels.workspace(self.device),
            free_slots=call.free_slots,
        )
        layer.reroute(call.scores, ids, weights, call.policy_ids, router.bias, 1, call.gates)
        assert_gaps_untouched(ids)
        assert_gaps_untouched(weights)
        assert not statistics[[0, 2]].any()
        return Outcome(ids.cpu(), weights.cpu(), union.cpu(), statistics[1].tolist(), 0)

    def place(self, tensor: Tensor) -> Tensor:
        """A copy on the device with the strides of `tensor`."""
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((extent,), (1,)).clone().to(self.device)
        return flat.as_strided(tensor.shape, tensor.stride())

    def place_router(self, router: Router) -> Router:
        return router if router.bias is None else replace(router, bias=router.bias.to(self.device))


class Simulated:
    """The CUDA kernels on the simulator, or with another `backend` the driver's CPU code."""

    def __init__(self, driver: Driver, backend: str = "cuda") -> None:
        self.driver = driver
        self.backend = backend

    def __call__(self, call: Call, *, out_gap: int = 0, in_place: bool = False) -> Outcome:
        router = call.router
        is_given = call.gates is not None
        call = call.laid_out(lambda x: x if x.stride(1) == 1 else x.contiguous())
        return self.driver.run(
            call.scores,
            call.policy_ids,
            call.table,
            call.topk_ids,
            call.topk_weights,
            backend=self.backend,
            seed=call.seed,
            gates=call.gates,
            bias=None if is_given else router.bias,
            scoring="given" if is_given else router.scoring,
            num_groups=1 if is_given else router.num_groups,
            top_groups=1 if is_given else router.top_groups,
            renormalize=router.renormalize,
            scale=router.scale,
            free_slots=call.free_slots,
            out_gap=out_gap,
            in_place=in_place,
        )


# --- fixtures ----------------------------------------------------------------------------------

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
COMPILED = [
    *(f"cpu {name}" for name in INSTRUCTION_SETS),
    "simulator",
    *(["cuda"] if torch.cuda.is_available() else []),
]


@cache
def plain_driver() -> Path:
    return build_driver("plain", has_cpu=False)


@pytest.fixture(scope="module", params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Every compiled implementation that runs here."""
    yield from open_implementation(request.param)


@pytest.fixture(scope="module", params=["reference", *COMPILED])
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The reference and every compiled implementation that runs here."""
    yield from open_implementation(request.param)


def open_implementation(name: str) -> Iterator[Implementation]:
    if name == "reference":
        yield Reference()
    elif name == "cuda":
        yield Compiled("cuda")
    elif name == "simulator":
        yield from _open_simulator()
    else:
        yield from _open_cpu(name.removeprefix("cpu "))


def _open_simulator() -> Iterator[Implementation]:
    reason = building.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    driver = Driver(plain_driver())
    yield Simulated(driver)
    driver.close()


def _open_cpu(instruction_set: str) -> Iterator[Implementation]:
    chosen = native.choose("cpu")
    if chosen.module is None:
        pytest.skip(chosen.reason)
    before = chosen.name.removeprefix("cpu ")
    if instruction_set not in str(chosen.module.instruction_sets()).split():
        pytest.skip(f"this processor lacks {instruction_set}")
    chosen.module.use_instruction_set(instruction_set)
    yield Compiled("cpu")
    chosen.module.use_instruction_set(before)
