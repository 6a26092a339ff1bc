"""Whether a server can listen where it is told to. Stdlib only: asked before SGLang is imported."""

from __future__ import annotations

import errno
import socket
from typing import Any

from ..errors import EngineError


def refuse_taken(host: str, port: int) -> None:
    """Raise `EngineError` if nobody could listen on `port` of `host` now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        problems = [_problem(family, address) for family, _, _, _, address in found]
    except OSError as error:
        problems = [error]
    for problem in problems:
        if problem and problem.errno == errno.EADDRINUSE:
            raise EngineError(
                f"port {port} of {host} is in use by another process; end it, or choose another "
                "port with --port"
            )
    if None not in problems:  # a name may have addresses of a family that this machine lacks
        raise EngineError(
            f"cannot listen on port {port} of {host}: {problems[0]}; choose others with --host and "
            "--port"
        )


def _problem(family: int, address: tuple[Any, ...]) -> OSError | None:
    """As `socket.create_server`, which drops the scope of an IPv6 address (`fe80::1%eth0`)."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        return error
    return None
