"""The end of a process that cannot serve what was configured. Stdlib only until it comes to that.

SGLang's plugin loader logs and ignores exceptions of a plugin and then serves without it. Here that
would mean serving other routing than the operator configured, so every failure ends the process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from .. import environment


@contextmanager
def ends_on_error(*, is_serving: bool = False) -> Iterator[None]:
    """End this process if what runs inside finds that it cannot serve what was configured.

    Args:
        is_serving: tell the parent process as well, as SGLang's scheduler does where it fails;
            once a server runs, nobody need be waiting for the exit of one of its schedulers.
    """
    from ..errors import RoutingError

    try:
        yield
    except RoutingError as error:
        try:
            fatal(error)
        finally:
            parent = multiprocessing.parent_process()
            if is_serving and parent is not None and parent.pid is not None:
                os.kill(parent.pid, signal.SIGQUIT)


def fatal(error: BaseException, *, at_once: bool = False) -> NoReturn:
    """End this process with one message. `SystemExit` passes through SGLang's plugin loader.

    Args:
        at_once: skip the interpreter's shutdown. Once schedulers were started, the message queues
            of the main process may wait forever for a dead one to take its last messages.
    """
    from ..errors import describe

    process = multiprocessing.current_process().name
    text = f"sglang-moe-routing: {process}: cannot serve: {describe(error)}"
    print(text, file=sys.stderr, flush=True)
    if at_once:
        sys.stdout.flush()
        os._exit(environment.EXIT_CODE)
    raise SystemExit(environment.EXIT_CODE) from error
