"""Around ``launch_server`` and ``Engine._launch_subprocesses``.

The first adds our routes and the response header to SGLang's HTTP app; the second refuses
unsupported flags before any process is spawned, also for the offline `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import EngineError, RoutingError
from .. import metrics
from ..environment import EXIT_CODE
from ..hooking import Hook
from ..plugin import fatal
from ..refusals import refuse_unsupported
from ..routes import add_routes


def around_launch_server(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.entrypoints import http_server

    add_routes(http_server.app)
    try:
        return original(*args, **kwargs)
    except RoutingError as error:
        fatal(error)
    except RuntimeError as error:
        if f"exit code: {EXIT_CODE}" not in str(error):
            raise
        refusal = EngineError("a scheduler process refused to start; its message is above")
        fatal(refusal, at_once=True)


def before_launch(cls: type, server_args: Any, *args: Any, **kwargs: Any) -> None:
    refuse_unsupported(server_args)
    metrics.enable(bool(server_args.enable_metrics))


LAUNCH_SERVER = Hook(
    target="sglang.srt.entrypoints.http_server.launch_server",
    parameters=(
        "server_args",
        "init_tokenizer_manager_func",
        "run_scheduler_process_func",
        "run_detokenizer_process_func",
        "execute_warmup_func",
        "launch_callback",
    ),
    kind="around",
    function=around_launch_server,
    main_only=True,
)
LAUNCH = Hook(
    target="sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
    parameters=(
        "cls",
        "server_args",
        "init_tokenizer_manager_func",
        "run_scheduler_process_func",
        "run_detokenizer_process_func",
        "port_args",
        "placement_group",
    ),
    kind="before",
    function=before_launch,
    main_only=True,
)
