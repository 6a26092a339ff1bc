"""Around ``Req.__init__``: a request in the scheduler gets its policy id and KV cache namespace.

Why here: every way into the scheduler makes a `Req`, on every TP rank alike. The policy arrives
in `SamplingParams.custom_params`, which are the client's again before SGLang sees them. It is
checked again, should a front end without our hooks have let it through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from .... import runtime
from ....config import BODY_KEY
from ....engine.hooking import Hook
from ....errors import RoutingRequestError
from ....runtime.definitions import CACHE_PREFIX, VANILLA_ID
from ...marks import GROUP_ID, POLICY_ID
from ...transport import Choice, unpack

_DEFAULT_GROUP_ID = 0
_SESSION = "_sglang_moe_routing_choice"


def around(
    original: Callable[..., Any],
    self: Any,
    rid: str,
    origin_input_text: str | None,
    origin_input_ids: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    params, choice = _take_choice(sampling_params)
    original(self, rid, origin_input_text, origin_input_ids, params, *args, **kwargs)
    _apply(self, choice)


def _take_choice(sampling_params: Any) -> tuple[Any, Choice]:
    """On a copy: items of a batch may share the object, and a session asks for it again."""
    custom = sampling_params.custom_params
    client, choice = unpack(custom)
    if choice is None:
        named = custom.get(BODY_KEY) if isinstance(custom, dict) else None
        return sampling_params, Choice(runtime.current().config.default if named is None else named)
    params = copy.copy(sampling_params)
    params.custom_params = client
    return params, choice


def _apply(self: Any, choice: Choice) -> None:
    state = runtime.current()
    setattr(self, POLICY_ID, VANILLA_ID)
    setattr(self, GROUP_ID, _DEFAULT_GROUP_ID)
    try:
        policy_id = _policy_id(state, choice.policy)
        group = _group(state, choice.group)
        _check_session(self, (policy_id, group))
    except RoutingRequestError as error:
        state.rejections[error.reason] += 1
        self.set_finish_with_abort(str(error))
        return
    setattr(self, POLICY_ID, policy_id)
    setattr(self, GROUP_ID, state.config.isolation.groups.index(group))
    state.ids.use(policy_id, self)
    self.cache_salt = _salt(state.ids.table[policy_id].cache_key, group, self.cache_salt)


def _salt(cache_key: str, group: str, given: str | None) -> str | None:
    """Namespace of a request's KV: rows of its group decided about what it writes.

    It is the salt because that is part of every key of SGLang's: radix tree, host and storage
    tiers, and the hashes of KV events, whose default format leaves `extra_key` out.

    Args:
        given: the client's own salt; it separates further and must not pass for one of ours.
    """
    if cache_key:
        return f"{cache_key}{group}|{given or ''}"
    return f"{CACHE_PREFIX}|{given}" if given and given.startswith(CACHE_PREFIX) else given


def _policy_id(state: runtime.Process, name: object) -> int:
    if not isinstance(name, str) or name not in state.ids.of_name:
        known = ", ".join(state.config.names)
        raise RoutingRequestError(
            f"unknown MoE routing policy {name!r}; available: {known}", reason="unknown"
        )
    return state.ids.of_name[name]


def _group(state: runtime.Process, name: object) -> str:
    """The HTTP process named it from the config; anything else comes from a front end of others."""
    if not isinstance(name, str) or name not in state.config.isolation.groups:
        raise RoutingRequestError(f"unknown isolation group {name!r}", reason="reserved")
    return name


def _check_session(req: Any, choice: tuple[int, str]) -> None:
    """A session continues on the KV of its earlier requests: same policy id, same group."""
    if req.session is None:
        return
    if getattr(req.session, _SESSION, choice) != choice:
        raise RoutingRequestError(
            "a session must keep the MoE routing policy of its first request, in the definition "
            "that it had then, and the isolation group; open a new session",
            reason="session",
        )
    setattr(req.session, _SESSION, choice)


HOOK = Hook(
    target="sglang.srt.managers.schedule_batch.Req.__init__",
    kind="around",
    function=around,
)
