"""Whether a server can listen where it is told to. Stdlib only: asked before SGLang is imported."""

from __future__ import annotations

import errno
import socket

from ..errors import EngineError


def refuse_taken(host: str, port: int) -> None:
    """Raise `EngineError` if nobody could listen on `port` of `host` now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            socket.create_server(address[:2], family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EngineError(
                f"port {port} of {host} is in use by another process; end it, or choose another "
                "port with --port"
            ) from None
        raise EngineError(
            f"cannot listen on port {port} of {host}: {error.strerror}; choose others with --host "
            "and --port"
        ) from None
