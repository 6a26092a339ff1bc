"""A policy, held to what every policy promises. Alone in this room it knows policies: it runs one.

Rules are run by the torch reference, as are policies in torch; the compiled kernels apply any rule,
and are held to the reference by the tests of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CheckError, PolicyError
from ..policies import (
    FREE,
    PAD,
    UNLIMITED,
    Place,
    Policy,
    PolicyTable,
    Rerouted,
    Router,
    TopK,
    TorchPolicy,
    Vanilla,
    build_table,
    reroute,
)
from . import oracle
from .calls import check_call

NUM_VALUES = 1024
"""Numbers of live rows at which rules are compared one by one."""

_VANILLA, _TOPK, _MINE = range(3)
_EXTREMES = (0, 1, UNLIMITED)
_ARTIFACT = "random"
_ROUTERS = (Router(), Router(scoring="sigmoid", renormalize=False, scale=2.5))


def check_policy(
    policy: Policy, *, top_k: int = 8, num_experts: int = 64, layers: Sequence[int] = (0, 1)
) -> None:
    """Hold a policy to what every policy promises; takes a few seconds and no GPU.

    - Its rule is one, the same whenever it is asked, and changes at `steps` only. The same holds
      with each of its fields at 0, at 1 and without limit, where its own checks let that pass.
    - No row, rows of padding alone, ties, NaN and infinite logits, rows without any weight, and a
      router that chose other experts than the best are routed like any.
    - Each of its rows holds distinct experts; weights are finite, not negative, and no more in
      sum than the model's. Under a rule, ids and weights are those of the `oracle`.
    - Rows of vanilla and of another policy stay, bit for bit, what they are without it. Padded rows
      change nothing. The same call gives the same again.
    - In a policy in torch, shapes depend on shapes alone, and nothing waits for the device: it runs
      on tensors without contents that claim to be on a GPU.

    Args:
        policy: of any kind, a rule or a `TorchPolicy`; it gets a random similarity matrix if it
            uses one.
        top_k, num_experts: of the model, where the policy's numbers need another.
        layers: on which it is in force.

    Raises:
        CheckError: a promise is broken. Names the policy, the case, and what is wrong.
    """
    name = f"policy of kind {policy.kind}"
    for index, layer in enumerate(layers):
        sizes = _Sizes(layer, top_k, num_experts)
        _check(policy, sizes, name, most_calls=None)
        if index == 0:
            for case, variant in _variants(policy, top_k, num_experts):
                _check(variant, sizes, f"{name} with {case}", most_calls=3)
            if isinstance(policy, TorchPolicy):
                with _naming(f"{name}, captured in a graph"):
                    _check_capture(policy, sizes)


@dataclass(frozen=True)
class _Sizes:
    layer: int
    top_k: int
    num_experts: int

    def place(self, num_live: int) -> Place:
        return Place(self.layer, num_live, self.top_k, self.num_experts)


@dataclass(frozen=True)
class _Call:
    """One MoE call: the rows' logits and what the router chose. Row ids index the table."""

    name: str
    router: Router
    logits: Tensor
    ids: Tensor
    weights: Tensor
    rows: Tensor
    is_routers: bool

    def run(self, table: PolicyTable) -> Rerouted:
        scores, gates = self.router.score(self.logits, self.ids)
        return reroute(
            scores,
            gates,
            self.ids,
            self.weights,
            self.rows,
            table,
            renormalize=self.router.renormalize,
            scale=self.router.scale,
        )


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Name the place of whatever goes wrong."""
    try:
        yield
    except CheckError as error:
        raise CheckError(f"{where}: {error}") from None
    except PolicyError as error:
        raise CheckError(f"{where}: {error}") from error
    except Exception as error:
        raise CheckError(f"{where}: {type(error).__name__}: {error}") from error


def _check(policy: Policy, sizes: _Sizes, name: str, most_calls: int | None) -> None:
    where = f"{name}, layer {sizes.layer}"
    with _naming(where):
        _check_rule(policy, sizes)
        table, others = _table(sizes, policy), _table(sizes)
    for call in islice(_calls(sizes, policy.starts()), most_calls):
        with _naming(f"{where}, {call.name}"):
            _check_call(policy, call, table, others, sizes)


def _check_rule(policy: Policy, sizes: _Sizes) -> None:
    starts = policy.starts()
    rules = [policy.in_force(sizes.place(n)) for n in range(1, NUM_VALUES + 1)]
    for n, rule in enumerate(rules, start=1):
        again = policy.in_force(sizes.place(n))
        if again != rule:
            raise CheckError(
                f"the rule at {n} live rows is {rule!r}, and {again!r} when asked again"
            )
        if n > 1 and rule != rules[n - 2] and n not in starts:
            raise CheckError(
                f"the rule at {n} live rows differs from that at {n - 1}: add {n} to `steps`"
            )


def _table(sizes: _Sizes, *policies: Policy) -> PolicyTable:
    """Vanilla, another policy, and `policies`."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.num_experts, sizes.num_experts)
    used = [_ARTIFACT if policy.uses_similarity else None for policy in policies]
    return build_table(
        [Vanilla(), _other(sizes), *policies],
        layer=sizes.layer,
        top_k=sizes.top_k,
        num_experts=sizes.num_experts,
        similarity={_ARTIFACT: torch.rand(shape, generator=generator)},
        artifacts=[None, None, *used],
    )


def _other(sizes: _Sizes) -> TopK:
    """A policy whose rows do not depend on the union."""
    return TopK.model_validate({"k0": max(1, sizes.top_k // 2)})


def _variants(policy: Policy, top_k: int, num_experts: int) -> Iterator[tuple[str, Policy]]:
    """The policy with one field at an extreme, where nothing of its own refuses that."""
    given = {name: getattr(policy, name) for name in policy.model_fields_set}
    for name in type(policy).model_fields.keys() - {"kind", "engage"}:
        for value in _EXTREMES:
            with _naming(f"policy of kind {policy.kind} with {name}: {value}"):
                try:
                    variant = type(policy).model_validate({**given, name: value})
                except ValidationError:
                    continue
                if not variant.check(top_k, num_experts):
                    yield f"{name}: {value}", variant


def _calls(sizes: _Sizes, starts: Iterable[int]) -> Iterator[_Call]:
    generator = torch.Generator().manual_seed(0)
    routers = cycle(_ROUTERS)

    def make(name: str, logits: Tensor, plan: Sequence[int], *, is_best: bool = True) -> _Call:
        router = next(routers)
        scored = oracle.router(
            logits.numpy(),
            sizes.top_k,
            scoring=router.scoring,
            renormalize=router.renormalize,
            scale=router.scale,
        )
        ids, weights = torch.from_numpy(scored.ids), torch.from_numpy(scored.weights).float()
        if not is_best:
            order = torch.rand(logits.shape, generator=generator).argsort(dim=1)
            ids = order[:, : sizes.top_k]
        finite = bool(logits.isfinite().all())
        return _Call(name, router, logits, ids, weights, torch.tensor(plan), is_best and finite)

    def random(num_rows: int) -> Tensor:
        return torch.randn(num_rows, sizes.num_experts, generator=generator)

    mixed = [_MINE, _VANILLA, _MINE, _TOPK, _MINE, _MINE]
    ties = random(6).round()
    yield make("a mixed batch", random(6), mixed)
    yield make("ties", ties, mixed)
    yield make("no rows", random(0), [])
    yield make("all rows padding", random(3), [PAD] * 3)
    yield make("all scores equal", torch.zeros(6, sizes.num_experts), mixed)
    yield make("a router that chose other experts", random(6), mixed, is_best=False)
    for name, value in (("NaN", torch.nan), ("infinite", torch.inf), ("huge", 1e30)):
        odd = torch.where(ties > 1, value, torch.where(ties < -1, -value, ties))
        odd[2], odd[4] = value, -value  # whole rows
        yield make(f"{name} logits", odd, mixed)
    around = {n for start in starts for n in (start - 1, start)}
    for n in sorted({1, 2, 17} | {n for n in around if 1 <= n <= 64}):
        yield make(f"{n} live rows", random(n), [*islice(cycle(mixed), n)])


def _check_call(
    policy: Policy, call: _Call, table: PolicyTable, others: PolicyTable, sizes: _Sizes
) -> None:
    found = call.run(table)
    if not _same_rows(found, call.run(table)):
        raise CheckError("the same call gives something else when it is made again")
    num_rows = len(call.rows)
    padding = torch.full((2, sizes.num_experts), torch.nan)
    padded = replace(
        call,
        logits=torch.cat([padding[:1], call.logits, padding[1:]]),
        ids=torch.nn.functional.pad(call.ids, (0, 0, 1, 1)),
        weights=torch.nn.functional.pad(call.weights, (0, 0, 1, 1)),
        rows=torch.nn.functional.pad(call.rows, (1, 1), value=PAD),
    )
    if not _same_rows(found, padded.run(table), slice(1, num_rows + 1)):
        raise CheckError("a padded row changes what other rows get")
    mine = call.rows == _MINE
    without = replace(call, rows=torch.where(mine, PAD, call.rows)).run(others)
    if not _same_rows(found, without, ~mine, ~mine):
        raise CheckError("rows of other policies are not what they are without it")
    _check_rows(call, found, mine, sizes)
    if not isinstance(policy, TorchPolicy):
        check_call(_record(policy, call, found, table, sizes), is_routers=call.is_routers)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _same_rows(found: Rerouted, other: Rerouted, theirs: Any = ..., mine: Any = ...) -> bool:
    return _same(found.topk_ids[mine], other.topk_ids[theirs]) and _same(
        found.topk_weights[mine], other.topk_weights[theirs]
    )


def _check_rows(call: _Call, found: Rerouted, mine: Tensor, sizes: _Sizes) -> None:
    """Hold its rows to what any engine can run."""
    for b in mine.nonzero().flatten().tolist():
        ids, weights = found.topk_ids[b].tolist(), found.topk_weights[b].tolist()
        held = [j for j in ids if j != FREE]
        if (
            not held
            or len({*held}) < len(held)
            or not all(0 <= j < sizes.num_experts for j in held)
        ):
            raise CheckError(f"row {b} holds {ids}: no distinct experts below {sizes.num_experts}")
        if not all(0 <= w < torch.inf for w in weights):
            raise CheckError(f"row {b} weighs {weights}: expected finite weights from 0")
        if any(w for j, w in zip(ids, weights, strict=True) if j == FREE):
            raise CheckError(f"row {b} holds {ids} and weighs {weights}: {FREE} is no expert")
        most = call.weights[b].sum().item()
        if call.router.renormalize and sum(weights) > most * (1 + 1e-5):
            raise CheckError(f"row {b} weighs {sum(weights)} in all, the model's own are {most}")


def _record(
    policy: Policy, call: _Call, found: Rerouted, table: PolicyTable, sizes: _Sizes
) -> dict[str, Any]:
    """The call as a recorder would have it."""
    names = {_VANILLA: "vanilla", _TOPK: "topk", _MINE: policy.kind}
    rows, other = call.rows.tolist(), _other(sizes).k0.default
    mine = policy.in_force(sizes.place(sum(row != PAD for row in rows)))
    rules: dict[int, dict[str, Any]] = {_VANILLA: {}, _TOPK: {"k0": other, "k_max": other}}
    rules[_MINE] = mine.model_dump(exclude_defaults=True)
    similarity = {}
    if mine.uses_similarity:
        rules[_MINE]["similarity"] = _ARTIFACT
        similarity[_ARTIFACT] = {"similarity": table.similarity[0].tolist()}
    return {
        "rows": [names.get(row) for row in rows],
        "rules": [rules.get(row) for row in rows],
        "router_logits": call.logits.tolist(),
        "base_ids": call.ids.tolist(),
        "base_weights": call.weights.tolist(),
        "final_ids": found.topk_ids.tolist(),
        "final_weights": found.topk_weights.tolist(),
        "union": found.union.nonzero().flatten().tolist(),
        "similarity": similarity,
        "router": {
            "num_experts": sizes.num_experts,
            "top_k": sizes.top_k,
            "free_slots": "ignored",
            "scoring": call.router.scoring,
            "renormalize": call.router.renormalize,
            "scale": call.router.scale,
            "bias": None,
            "num_groups": 1,
        },
    }


class _NoCopies(TorchDispatchMode):
    """Refuses copies between devices, for which the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {x.device.type for x in (out, *args) if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise CheckError("copies between the device and the host, which waits for it")
        return out


def _check_capture(policy: Policy, sizes: _Sizes) -> None:
    """Run a call on tensors of a GPU that is not there: they have shapes, and no contents."""
    from torch._subclasses import fake_tensor  # takes seconds

    table = _table(sizes, policy)
    with fake_tensor.FakeTensorMode(), _NoCopies():  # type: ignore[no-untyped-call]  # torch's

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        words = empty(*table.words.shape, dtype=torch.int32)
        table = replace(table, words=words, similarity=empty(*table.similarity.shape))
        for num_rows in (0, 5):
            each, some = (num_rows, sizes.num_experts), (num_rows, sizes.top_k)
            ids, rows = empty(*some, dtype=torch.int64), empty(num_rows, dtype=torch.int64)
            given = empty(*each), empty(*each), ids, empty(*some), rows
            try:
                found = reroute(*given, table, renormalize=True)
            except fake_tensor.DataDependentOutputException as error:
                raise CheckError(f"reads a tensor on the host, which waits: {error}") from error
            except fake_tensor.DynamicOutputShapeException as error:
                raise CheckError(f"has a shape that depends on contents: {error}") from error
            if found.topk_ids.shape != some:
                raise CheckError(f"gives ids of shape {tuple(found.topk_ids.shape)}, not {some}")
