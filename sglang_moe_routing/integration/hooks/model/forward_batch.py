"""After ``ForwardBatch.init_new``: requests of a batch become one policy id per row.

Why here: the only place that still sees the requests, in row order, and the true forward mode
(SGLang relabels MIXED as EXTEND later). The plan is host data; `hooks.forward` copies it to the
device. Rows beyond the requests are beam members, which are always vanilla.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .... import runtime
from ....engine.hooking import Hook
from ....runtime.definitions import VANILLA_ID
from ....runtime.plan import Plan
from ...marks import GROUP_ID, PLAN, POLICY_ID


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
        leaders = [e.leader_idx for e in _beams(batch) for _ in range(e.start, e.end)]
        return Plan(
            policy_ids=ids + [VANILLA_ID] * (batch_size - len(ids)),
            group_ids=groups + [groups[leader] for leader in leaders],
            request_ids=rids + [rids[leader] for leader in leaders],
            phase=mode.name,
            is_decode=True,
        )
    if not mode.is_extend():
        return None
    decoding = {id(req) for req in batch.decoding_reqs or ()} if mode.is_mixed() else set()
    definitions = runtime.current().ids.table
    rows: list[int] = []
    row_groups: list[int] = []
    row_rids: list[str] = []
    requests = zip(batch.reqs, ids, groups, batch.extend_lens, strict=True)
    for req, policy_id, group_id, num_tokens in requests:
        acts_in_prefill = definitions[policy_id].policy.engage.phase == "all"
        acts = id(req) in decoding or acts_in_prefill
        rows += [policy_id if acts else VANILLA_ID] * num_tokens
        row_groups += [group_id] * num_tokens
        row_rids += [req.rid] * num_tokens
    if not any(rows):
        return None
    return Plan(
        policy_ids=rows,
        group_ids=row_groups,
        request_ids=row_rids,
        phase=mode.name,
        is_decode=False,
    )


def _beams(batch: Any) -> Sequence[Any]:
    """Further rows of beam searches, which lie behind those of the requests."""
    return batch.beam_tail.entries if batch.beam_tail else ()


HOOK = Hook(
    target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    kind="after",
    function=after,
)
