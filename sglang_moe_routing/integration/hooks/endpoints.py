"""Before the handlers of every endpoint: model aliases, and errors as plain HTTP 400.

Some handlers start a streaming response before `generate_request` is called, where an error
could only become an event of a stream with status 200; others turn it into a 500. Deciding here
lets SGLang's own handler of `HTTPException` answer in the shape of each endpoint.
"""

from __future__ import annotations

from typing import Any

from ..hooking import Hook
from ..selecting import forget_selection, select_early, take_alias


def before_handler(self: Any, request: Any, raw_request: Any = None) -> None:
    """OpenAI chat, completions, embeddings...; Responses; Anthropic; Ollama."""
    if raw_request is None:
        return
    served_model = self.tokenizer_manager.served_model_name
    model = getattr(request, "model", None)
    base = take_alias(model, served_model, raw_request)
    if base != model:
        request.model = base
    select_early({"custom_params": getattr(request, "custom_params", None)}, raw_request)
    if not hasattr(request, "stream"):  # embeddings, tokenize and the like generate nothing
        forget_selection(raw_request)


def before_anthropic(self: Any, request: Any, raw_request: Any) -> None:
    before_handler(self.openai_serving_chat, request, raw_request)


def before_generate(obj: Any, request: Any) -> None:
    """``/generate``."""
    select_early(obj.sampling_params, request)


_HANDLER = ("self", "request", "raw_request")

HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        parameters=_HANDLER,
        kind="before",
        function=before_handler,
        main_only=True,
    ),
    Hook(
        target=(
            "sglang.srt.entrypoints.openai.serving_responses."
            "OpenAIServingResponses.create_responses"
        ),
        parameters=_HANDLER,
        kind="before",
        function=before_handler,
        main_only=True,
    ),
    Hook(
        target="sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages",
        parameters=_HANDLER,
        kind="before",
        function=before_anthropic,
        main_only=True,
    ),
    Hook(
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat",
        parameters=_HANDLER,
        kind="before",
        function=before_handler,
        main_only=True,
    ),
    Hook(
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate",
        parameters=_HANDLER,
        kind="before",
        function=before_handler,
        main_only=True,
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server.serve_generate_request",
        parameters=("obj", "request"),
        kind="before",
        function=before_generate,
        main_only=True,
    ),
)
