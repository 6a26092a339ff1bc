"""What a launch of SGLang passes by, from its flags to its HTTP app.

SGLang may load plugins as late as inside `Engine._launch_subprocesses`, where `launch_server` is
called as a function. What every way of starting must have hangs on functions that SGLang looks up
after that: `ServerArgs.check_server_args` before any process is spawned, the functions that spawn
them, `_scheduler_died_error` where one ends too soon, `_setup_and_run_http_server` before the app
starts. The hook of `launch_server`, which may have been entered already, holds only what matters
where plugins are loaded first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolved_view

from .... import environment, runtime
from ....engine.fatal import fatal
from ....engine.hooking import Hook
from ....errors import EngineError, RoutingError
from ....runtime import metrics
from ... import listening
from ...refusals import refuse_unsupported
from ...routes import add_routes

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells report it."""


def before_check(self: Any) -> None:
    refuse_unsupported(self)
    metrics.enable(bool(self.enable_metrics))


def around_spawn(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The digest marks the processes of an engine, and those that they start in turn.

    What a script starts before or after, engines of its own perhaps, must not inherit it.
    """
    os.environ[environment.CONFIG_SHA256] = runtime.current().loaded.sha256
    try:
        return original(*args, **kwargs)
    finally:
        os.environ.pop(environment.CONFIG_SHA256, None)


def after_death(error: Exception, rank: int, proc: Any) -> None:
    """End this process at once: the message queues may wait forever for the scheduler that died.

    SGLang kills it too, where a scheduler fails by an error of its own.
    """
    if proc.exitcode == environment.EXIT_CODE:
        refusal = EngineError("a scheduler process refused to start; its message is above")
        fatal(refusal, at_once=True)


def before_http(server_args: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.entrypoints import http_server

    try:
        _refuse_port(server_args)  # anew: the model took its time to load
    except RoutingError as error:
        fatal(error, at_once=True)
    add_routes(http_server.app)


def around_launch_server(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    try:
        _refuse_port(server_args)
        return original(server_args, *args, **kwargs)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except RoutingError as error:
        fatal(error)


def _refuse_port(server_args: Any) -> None:
    flags = resolved_view(server_args)
    listening.refuse_taken(flags.host, flags.port)


LAUNCH_SERVER = Hook(
    target="sglang.srt.entrypoints.http_server.launch_server",
    kind="around",
    function=around_launch_server,
)
DEATH = Hook(
    target="sglang.srt.entrypoints.engine._scheduler_died_error",
    kind="after",
    function=after_death,
)
HTTP = Hook(
    target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
    kind="before",
    function=before_http,
)
CHECK = Hook(
    target="sglang.srt.server_args.ServerArgs.check_server_args",
    kind="before",
    function=before_check,
)
SCHEDULERS = Hook(
    target="sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
    kind="around",
    function=around_spawn,
)
DETOKENIZERS = Hook(
    target="sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses",
    kind="around",
    function=around_spawn,
)
HOOKS = (CHECK, SCHEDULERS, DETOKENIZERS, DEATH, HTTP, LAUNCH_SERVER)
