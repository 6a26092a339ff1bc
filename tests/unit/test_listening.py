"""Which addresses a server may be told to listen on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sglang_moe_routing.errors import EngineError
from sglang_moe_routing.integration import listening

INTERFACES = Path("/proc/net/if_inet6")
LINK_LOCAL = "20"


def addresses_of_version_6() -> list[str]:
    """Addresses of this machine as ``--host`` takes them, the link-local ones with their scope."""
    found = []
    for line in INTERFACES.read_text().splitlines() if INTERFACES.exists() else ():
        digits, _, _, scope, _, interface = line.split()
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
        if address == "::1" or scope == LINK_LOCAL:
            found.append(f"{address}%{interface}" if scope == LINK_LOCAL else address)
    return found


@pytest.mark.parametrize("is_link_local", [False, True], ids=["loopback", "link-local"])
def test_a_port_of_an_ipv6_address_is_refused_only_while_it_is_in_use(is_link_local: bool) -> None:
    hosts = [host for host in addresses_of_version_6() if ("%" in host) is is_link_local]
    if not hosts:
        pytest.skip("this machine has no such IPv6 address")
    (found,) = socket.getaddrinfo(hosts[0], 0, type=socket.SOCK_STREAM)
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as other:
        other.bind(found[4])
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=rf"port {port} of {hosts[0]} is in use"):
            listening.refuse_taken(hosts[0], port)
    listening.refuse_taken(hosts[0], port)
