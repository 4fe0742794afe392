"""The ways in which the two ends of a local connection can spell each other's address."""

from __future__ import annotations

from socket import AF_INET, AF_INET6

from harness.steps import IPPROTO_MPTCP, Route

V4 = Route("v4", "127.0.0.1", "127.0.0.1", AF_INET, AF_INET)
V6 = Route("v6", "::1", "::1", AF_INET6, AF_INET6)
MAPPED = Route("v4-mapped to dual-stack", "::", "::ffff:127.0.0.1", AF_INET6, AF_INET6)
USUAL = (V4, V6, MAPPED)
"""What every scenario is played over."""

LOOPBACK = (
    *USUAL,
    Route("another loopback address", "127.1.2.3", "127.1.2.3", AF_INET, AF_INET),
    Route("v4-mapped to v4", "127.0.0.1", "::ffff:127.0.0.1", AF_INET, AF_INET6),
    Route("v4 to v4-mapped", "::ffff:127.0.0.1", "127.0.0.1", AF_INET6, AF_INET),
    Route("v4 to dual-stack", "::", "127.0.0.1", AF_INET6, AF_INET),
    Route("v6 to dual-stack", "::", "::1", AF_INET6, AF_INET6),
    Route("to 0.0.0.0", "0.0.0.0", "0.0.0.0", AF_INET, AF_INET),
    Route("to 0.0.0.0 on dual-stack", "::", "0.0.0.0", AF_INET6, AF_INET),
    Route("to ::", "::", "::", AF_INET6, AF_INET6),
    Route("to v4-mapped 0.0.0.0", "::", "::ffff:0.0.0.0", AF_INET6, AF_INET6),
)

LAN_V4 = "192.0.2.1"
LAN_V6 = "2001:db8::1"
LINK_LOCAL = "fe80::1"
ANY_V4 = "198.51.100.7"
LAN = (
    Route("own LAN address, v4", LAN_V4, LAN_V4, AF_INET, AF_INET),
    Route("own LAN address, v6", LAN_V6, LAN_V6, AF_INET6, AF_INET6),
    Route("own LAN address, v4-mapped", "::", f"::ffff:{LAN_V4}", AF_INET6, AF_INET6),
    Route("own LAN address, wildcard listener", "0.0.0.0", LAN_V4, AF_INET, AF_INET),
    Route("address of a network that is all the host's own", "0.0.0.0", ANY_V4, AF_INET, AF_INET),
    Route("own link-local address", LINK_LOCAL, LINK_LOCAL, AF_INET6, AF_INET6, scope="cable"),
)
"""For a namespace that has these addresses on a device other than loopback, and ANY_V4 routed."""

MULTIPATH = tuple(
    Route(
        f"{route}, MPTCP on {where}",
        route.bound,
        route.target,
        route.server_family,
        route.client_family,
        server,
        client,
    )
    for route in USUAL
    for where, server, client in (
        ("both ends", IPPROTO_MPTCP, IPPROTO_MPTCP),
        ("the listener", IPPROTO_MPTCP, 0),
        ("the client", 0, IPPROTO_MPTCP),
    )
)
