"""Before ``TokenizerManager.generate_request``, after ``_wait_one_response``.

`generate_request` is the choke point of every endpoint and of the offline `Engine`: each request
is given the policy that header, body, alias or default name, packed into ``custom_params``, which
travel to the scheduler. `_wait_one_response` yields the results of one single request, whose
``meta_info`` says which policy was applied.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import GenerateReqInput

from .... import runtime
from ....config import BODY_KEY
from ....engine.hooking import Hook
from ....runtime import metrics
from ... import http_server
from ...selecting import forget_selection, require_key, select
from ...transport import Choice, pack, packed_policy, without_choice


def before(self: Any, obj: Any, request: Any = None) -> None:
    if _is_health_check(obj, request):
        _unmark(obj)
        return
    if not isinstance(obj, GenerateReqInput):
        require_key(request)
        forget_selection(request)
        _unmark(obj)
        return
    choices = select(obj.sampling_params, request)
    given = obj.sampling_params
    items = given if isinstance(given, list) else [given]
    usual = self.preferred_sampling_params or {}
    marked = [_mark(item, usual, choice) for item, choice in zip(items, choices, strict=True)]
    obj.sampling_params = marked if isinstance(given, list) else marked[0]
    if http_server.is_there() and http_server.is_own_warm_up(request):
        return  # no client sent it
    for choice in choices * (_num_prompts(obj) if len(choices) == 1 else 1):
        metrics.count_request(choice.policy)


def _num_prompts(obj: GenerateReqInput) -> int:
    for prompts in (obj.text, obj.input_ids):
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
            return len(prompts)
    return 1


def _is_health_check(obj: Any, request: Any) -> bool:
    if request is None or not isinstance(obj.rid, str):
        return False
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return obj.rid.startswith(HEALTH_CHECK_RID_PREFIX) and path.startswith("/health")


def _unmark(obj: Any) -> None:
    """Embeddings choose nothing: what a client calls policy or group must not reach a scheduler."""
    given = obj.sampling_params
    for item in given if isinstance(given, list) else [given]:
        custom = item.get("custom_params") if isinstance(item, dict) else None
        if isinstance(custom, dict):
            item["custom_params"] = without_choice(custom)


def _mark(
    sampling_params: dict[str, Any] | None, usual: dict[str, Any], choice: Choice
) -> dict[str, Any]:
    """Always say the policy, the default too: a reload may change it while the request travels.

    Args:
        usual: the server's own sampling params, which a request that has the key overrides.
    """
    params = dict(sampling_params or {})
    params.pop(BODY_KEY, None)  # SGLang fails on it
    given = params.get("custom_params", usual.get("custom_params"))
    params["custom_params"] = pack(given, choice)
    return params


async def report(
    responses: AsyncIterator[Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    name = packed_policy(getattr(obj, "sampling_params", None)) or runtime.current().config.default
    async for response in responses:
        if isinstance(obj, GenerateReqInput):
            response["meta_info"][BODY_KEY] = name
        yield response


GENERATE = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
    kind="before",
    function=before,
)
REPORT = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
    kind="after",
    function=report,
)
