"""After SGLang has built an OpenAI answer or stream: the applied policy in its body.

SGLang's extensions of OpenAI's format are an object ``sglext``, in whole answers and in events of a
stream. Where it also fills a ``metadata`` object, as in whole answers, that names the policy too;
no event of a stream has one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, create_model

from ....config import BODY_KEY
from ....engine.hooking import Hook
from ...transport import packed_policy

_DATA = "data: "
_LAST = ('"finish_reason":"', '"choices":[]')
"""What the closing events of a stream hold. Quotes within JSON strings are escaped."""


def after_whole(
    response: Any, self: Any, request: Any, ret: list[dict[str, Any]], *args: Any, **kwargs: Any
) -> Any:
    if not isinstance(response, BaseModel):
        return response  # an error
    return name_policy(response, ret[0]["meta_info"][BODY_KEY])


def name_policy(response: BaseModel, name: str) -> BaseModel:
    """`response` with the policy in its ``sglext``, and in its ``metadata`` if it has any."""
    extended, extension = _extended(type(response))
    content = {field: getattr(response, field) for field in type(response).model_fields}
    known: Any = vars(content["sglext"]) if content["sglext"] else {}
    content["sglext"] = extension.model_construct(**{**known, BODY_KEY: name})
    if content.get("metadata"):
        content["metadata"] = {**content["metadata"], BODY_KEY: name}
    return extended.model_construct(**content)


@functools.cache
def _extended(model: type[BaseModel]) -> tuple[type[BaseModel], type[BaseModel]]:
    """`model` with an ``sglext`` that has our field, and the class of that object."""
    (base,) = (t for t in get_args(model.model_fields["sglext"].annotation) if t is not NoneType)
    own: Any = {BODY_KEY: (str | None, None)}
    extension = create_model(base.__name__, __base__=base, **own)
    return (
        create_model(model.__name__, __base__=model, sglext=(extension | None, None)),
        extension,
    )


async def after_stream(
    events: AsyncIterator[str], self: Any, adapted_request: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            is_last = event.startswith(_DATA) and any(mark in event for mark in _LAST)
            yield _name_policy_in(event, adapted_request) if is_last else event


def _name_policy_in(event: str, adapted_request: Any) -> str:
    chunk = json.loads(event.removeprefix(_DATA))
    name = packed_policy(adapted_request.sampling_params)
    chunk["sglext"] = {**(chunk.get("sglext") or {}), BODY_KEY: name}
    return f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response",
        kind="after",
        function=after_whole,
    ),
    Hook(
        target=(
            "sglang.srt.entrypoints.openai.serving_completions."
            "OpenAIServingCompletion._build_completion_response"
        ),
        kind="after",
        function=after_whole,
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
        kind="after",
        function=after_stream,
    ),
    Hook(
        target=(
            "sglang.srt.entrypoints.openai.serving_completions."
            "OpenAIServingCompletion._generate_completion_stream"
        ),
        kind="after",
        function=after_stream,
    ),
)
