"""After ``ForwardBatch.init_new``: requests of a batch become one policy id per row.

Why here: the only place that still sees the requests, in row order, and the true forward mode
(SGLang relabels MIXED as EXTEND later). The plan is host data; `hooks.forward` copies it to the
device. Rows beyond the requests are beam members, which are always vanilla.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

from .... import runtime
from ....engine.hooking import Hook
from ....runtime.definitions import VANILLA_ID
from ....runtime.plan import Plan
from ...marks import GROUP_ID, PLAN, POLICY_ID

Value = TypeVar("Value")


def after(
    forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    if not model_runner.is_draft_worker:
        runtime.current().model.has_run = True
        setattr(forward_batch, PLAN, make_plan(batch, forward_batch.batch_size))


def make_plan(batch: Any, batch_size: int) -> Plan | None:
    """Plan of a `ScheduleBatch`; None where no row can be re-routed."""
    mode = batch.forward_mode
    ids = [getattr(req, POLICY_ID) for req in batch.reqs]
    groups = [getattr(req, GROUP_ID) for req in batch.reqs]
    rids = [req.rid for req in batch.reqs]
    if mode.is_decode():
        beams = batch.beam_tail.entries if batch.beam_tail else ()  # behind the requests
        leaders = [e.leader_idx for e in beams for _ in range(e.start, e.end)]
        ids += [VANILLA_ID] * (batch_size - len(ids))
        groups += [groups[leader] for leader in leaders]
        rids += [rids[leader] for leader in leaders]
    elif mode.is_extend():
        ids = _by_token(_acting(batch, ids), batch)
        if not any(ids):
            return None
        groups, rids = _by_token(groups, batch), _by_token(rids, batch)
    else:
        return None
    return Plan(
        policy_ids=ids,
        group_ids=groups,
        request_ids=rids,
        phase=mode.name,
        is_decode=mode.is_decode(),
    )


def _acting(batch: Any, ids: Sequence[int]) -> list[int]:
    """Policy ids of an extend batch's requests; prompts are vanilla but for phase 'all'."""
    decoding = (
        {id(req) for req in batch.decoding_reqs or ()} if batch.forward_mode.is_mixed() else ()
    )
    definitions = runtime.current().ids.table
    return [
        i if id(req) in decoding or definitions[i].policy.engage.phase == "all" else VANILLA_ID
        for req, i in zip(batch.reqs, ids, strict=True)
    ]


def _by_token(values: Iterable[Value], batch: Any) -> list[Value]:
    """The requests' `values`, each as often as its request has tokens in an extend batch."""
    sized = zip(values, batch.extend_lens, strict=True)
    return [*chain.from_iterable(repeat(value, num_tokens) for value, num_tokens in sized)]


HOOK = Hook(
    target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    kind="after",
    function=after,
)
