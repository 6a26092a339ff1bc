"""From an SGLang request to policy names, and what the HTTP response says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers

from .. import runtime
from ..config import (
    BODY_KEY,
    DEFAULT_GROUP,
    GROUP_KEY,
    choose,
    choose_group,
    find_in_body,
    split_alias,
)
from ..errors import EngineError, RoutingRequestError
from ..policies import Vanilla
from ..runtime import metrics
from . import http_server
from .transport import Choice

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
SCOPE_KEY = "sglang_moe_routing"


@dataclass
class Selection:
    """What one HTTP request asked for and got; travels in the ASGI scope."""

    body: dict[str, Any] = field(default_factory=dict)
    named: list[tuple[str, object]] = field(default_factory=list)
    alias: str | None = None
    applied: list[str] = field(default_factory=list)


class PolicyHeaderMiddleware:
    """Pure ASGI middleware: the response says which policy was applied, streams included.

    It lets the scripts of other origins read that header, as SGLang lets them call every route.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        selection = scope[SCOPE_KEY] = Selection()
        header = runtime.current().config.header[0].lower().encode()

        async def send_with_header(message: MutableMapping[str, Any]) -> None:
            is_start = message["type"] == "http.response.start"
            if is_start and selection.applied and message["status"] < 400:
                applied = ", ".join(dict.fromkeys(selection.applied))
                message["headers"] = [
                    *message.get("headers", []),
                    (header, applied.encode()),
                    (b"access-control-expose-headers", header),
                ]
            await send(message)

        await self._app(scope, receive, send_with_header)


def select(sampling_params: Any, request: Any) -> list[Choice]:
    """Policy and group of every item of a request; remembers policies for the response header.

    Args:
        sampling_params: one dict, a list of them for a batch, or None.
        request: the Starlette request, None for the offline engine.

    Raises:
        RoutingRequestError: the client asked for something that it cannot have.
    """
    items = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    decided: dict[str, Choice] = {}
    with _counted():
        choices = [_choose(item, request, decided) for item in items]
    _selection(request).applied = [choice.policy for choice in choices]
    return choices


def _choose(sampling_params: Any, request: Any, decided: dict[str, Choice]) -> Choice:
    """Choice of one item.

    Args:
        decided: choices by what items name: a batch may hold many, its header and body are one.
    """
    custom = _custom_params(sampling_params)
    named = [(f"custom_params.{BODY_KEY}", custom.get(BODY_KEY))]
    if isinstance(sampling_params, dict):
        named.append((f"sampling_params.{BODY_KEY}", sampling_params.get(BODY_KEY)))
    key = repr(named)
    if key not in decided:
        decided[key] = _decide(named, request)
    choice = decided[key]
    _refuse_beam_search(sampling_params, choice.policy)
    for given in (custom, _custom_params(_selection(request).body)):
        if given.get(GROUP_KEY, choice.group) != choice.group:
            raise RoutingRequestError(
                f"custom_params.{GROUP_KEY} is set by the server; leave it out", reason="reserved"
            )
    return choice


def _decide(named: list[tuple[str, object]], request: Any) -> Choice:
    config, selection = runtime.current().config, _selection(request)
    headers = request.headers if request is not None else Headers()
    policy = choose(
        config,
        headers=[(name, value) for name in config.header for value in headers.getlist(name)],
        alias=selection.alias,
        body=[*named, *selection.named],
    )
    return Choice(policy, _group(policy, request))


def _group(policy: str, request: Any) -> str:
    config = runtime.current().config
    if not _needs_key(request):
        return config.isolation.policies.get(policy, DEFAULT_GROUP)
    authorization = request.headers.get("authorization") if request is not None else None
    return choose_group(config, policy, authorization)


def require_key(request: Any) -> None:
    """Ask a request that chooses no policy for its API key, as `select` does."""
    with _as_http_error(), _counted():
        _group(runtime.current().config.default, request)


def _needs_key(request: Any) -> bool:
    """Requests of the offline engine and of SGLang's warm-up bring none.

    Where there is an HTTP server, an endpoint without a request object (/v1/realtime) shows no key.
    """
    return http_server.is_there() and not http_server.is_own_warm_up(request)


def select_early(sampling_params: Any, request: Any) -> None:
    """Select before an endpoint starts its response, so that an error is a plain HTTP 4xx."""
    with _as_http_error():
        select(sampling_params, request)


@contextmanager
def _counted() -> Iterator[None]:
    try:
        yield
    except RoutingRequestError as error:
        metrics.count_rejection(error.reason)
        raise


@contextmanager
def _as_http_error() -> Iterator[None]:
    try:
        yield
    except RoutingRequestError as error:
        raise HTTPException(status_code=error.status, detail=str(error)) from None


def forget_selection(request: Any) -> None:
    """Say nothing in the response header: the request generates nothing."""
    _selection(request).applied = []


def note_body(request: Any, body: Any) -> None:
    """Remember the body of a request: SGLang's own models of it drop what they do not know."""
    selection = _selection(request)
    selection.body = dict(body) if isinstance(body, Mapping) else {}
    selection.named = list(find_in_body(selection.body))


def take_alias_of_body(served_model: str, request: Any) -> None:
    """Remember the policy of a ``model`` field that the endpoint itself does not read."""
    model = _selection(request).body.get("model")
    take_alias(model if isinstance(model, str) else None, served_model, request)


def take_alias(model: str | None, served_model: str, request: Any) -> str | None:
    """Strip ``@policy`` off a model name and remember the policy."""
    if model is None:
        return None
    base, alias = split_alias(runtime.current().config, model, served_model)
    _selection(request).alias = alias
    return base


def _selection(request: Any) -> Selection:
    """What the middleware laid into the request's scope; without a request there is nobody to ask.

    Raises:
        EngineError: the app was set up without the middleware: no answer would say its policy.
    """
    if request is None:
        return Selection()
    selection: Selection | None = request.scope.get(SCOPE_KEY)
    if selection is None:
        raise EngineError(
            "this HTTP app was set up without the routing middleware; start the server as SGLang "
            "does (sglang serve, or launch_server)"
        )
    return selection


def _refuse_beam_search(sampling_params: Any, name: str) -> None:
    """Beam members are rows without requests of their own, so they cannot follow a policy."""
    config = runtime.current().config
    policy = config.definitions[config.names.index(name)]
    width = sampling_params.get("beam_width") if isinstance(sampling_params, dict) else None
    if (width or 1) > 1 and not isinstance(policy, Vanilla):
        raise RoutingRequestError(
            f"beam search runs under the vanilla MoE routing policy only, not {name!r}",
            reason="beam_search",
        )


def _custom_params(sampling_params: Any) -> dict[str, Any]:
    given = sampling_params.get("custom_params") if isinstance(sampling_params, dict) else None
    if given is not None and not isinstance(given, dict):
        raise RoutingRequestError(
            f"custom_params is {given!r:.80}, expected an object", reason="malformed"
        )
    return given or {}
