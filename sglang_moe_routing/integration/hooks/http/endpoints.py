"""Before the handlers of every endpoint: model aliases, and errors as plain HTTP 400.

Around the parsing of bodies: what they say of the policy, on every endpoint alike.

Some handlers start a streaming response before `generate_request` is called, where an error
could only become an event of a stream with status 200; others turn it into a 500. Deciding here
lets SGLang's own handler of `HTTPException` answer in the shape of each endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....config import BODY_ITEMS, BODY_KEY
from ....engine.hooking import Hook
from ... import http_server
from ...selecting import forget_selection, note_body, select_early, take_alias, take_alias_of_body


async def around_json(original: Callable[..., Any], self: Any) -> Any:
    body = await original(self)
    note_body(self, body)
    return _without_choice_of_vertex(body)


def _without_choice_of_vertex(body: Any) -> Any:
    """SGLang makes a request of Vertex's ``parameters``, and fails on what that does not know."""
    parameters = body.get("parameters") if isinstance(body, dict) and BODY_ITEMS in body else None
    if not isinstance(parameters, dict):
        return body
    kept = {key: value for key, value in parameters.items() if key != BODY_KEY}
    custom = kept.get("custom_params")
    if isinstance(custom, dict) and custom.keys() == {BODY_KEY}:
        del kept["custom_params"]  # with more in it, the error is SGLang's own
    return {**body, "parameters": kept}


async def around_form(
    original: Callable[..., Any], *args: Any, raw_request: Any, **kwargs: Any
) -> Any:
    """``/v1/audio/transcriptions`` has no JSON."""
    note_body(raw_request, await raw_request.form())
    return await original(*args, raw_request=raw_request, **kwargs)


def before_handler(self: Any, request: Any, raw_request: Any = None) -> None:
    """OpenAI chat, completions, embeddings...; Responses; Anthropic; Ollama."""
    if raw_request is None:
        return
    served_model = self.tokenizer_manager.served_model_name
    if hasattr(request, "model"):
        request.model = take_alias(request.model, served_model, raw_request)
    else:
        take_alias_of_body(served_model, raw_request)
    select_early({"custom_params": getattr(request, "custom_params", None)}, raw_request)
    if not hasattr(request, "stream"):  # embeddings, tokenize and the like generate nothing
        forget_selection(raw_request)


def before_anthropic(self: Any, request: Any, raw_request: Any) -> None:
    before_handler(self.openai_serving_chat, request, raw_request)


def before_generate(obj: Any, request: Any) -> None:
    """``/generate`` and ``/vertex_generate``."""
    take_alias_of_body(http_server.tokenizer_manager().served_model_name, request)
    select_early(obj.sampling_params, request)


HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.http_server.ORJSONRequest.json",
        kind="around",
        function=around_json,
    ),
    Hook(
        target=(
            "sglang.srt.entrypoints.openai.serving_transcription."
            "OpenAIServingTranscription.create_transcription"
        ),
        kind="around",
        function=around_form,
    ),
    Hook(
        target="sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        kind="before",
        function=before_handler,
    ),
    Hook(
        target=(
            "sglang.srt.entrypoints.openai.serving_responses."
            "OpenAIServingResponses.create_responses"
        ),
        kind="before",
        function=before_handler,
    ),
    Hook(
        target="sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages",
        kind="before",
        function=before_anthropic,
    ),
    Hook(
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat",
        kind="before",
        function=before_handler,
    ),
    Hook(
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate",
        kind="before",
        function=before_handler,
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server.serve_generate_request",
        kind="before",
        function=before_generate,
    ),
)
