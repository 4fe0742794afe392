"""Where the daemon is, how to reach it, and why nobody answers there."""

from __future__ import annotations

import os
import re
import socket
from urllib.parse import unquote

from peercred.errors import InvalidArgument, PeerCredError, Refused, Unavailable

DEFAULT_ADDRESS = "unix:/run/peercredd/peercredd.sock"
ENVIRONMENT_VARIABLE = "PEERCRED_ADDRESS"

_SUN_PATH_MAX = 107
"""Bytes of a path that ``struct sockaddr_un`` holds beside the closing NUL, unix(7)."""

_OTHER_ADDRESS = re.compile(r"unix-abstract:.+|.+:[0-9]+")
"""What gRPC takes besides a path. It would look up a lone word as a host name."""

_NO_CONNECTION = "failed to connect to all addresses"
"""How gRPC's text begins when no connection came about, or none that the server kept."""

_START = "start it with `sudo peercredd` or `systemctl start peercredd`"


def resolve(address: str | None) -> str:
    """Return the gRPC address of the daemon: the given one, PEERCRED_ADDRESS, or the default.

    Raises:
        InvalidArgument: No daemon can have that address.

    """
    source = "address"
    if address is None:
        source = ENVIRONMENT_VARIABLE
        address = os.environ.get(ENVIRONMENT_VARIABLE, DEFAULT_ADDRESS)
    if not address:
        raise InvalidArgument(
            f"{source} is empty; give a gRPC address such as {DEFAULT_ADDRESS}, or none", source
        )
    if address.startswith("/"):
        raise InvalidArgument(f"{source} is a bare path; write unix:{address}", source)
    path = _unix_path(address)
    if path is None:
        if not _OTHER_ADDRESS.fullmatch(address):
            raise InvalidArgument(
                f"{source} {address!r} is no address; write unix:/path or HOST:PORT", source
            )
        return address
    if not path or (address.startswith("unix://") and not path.startswith("/")):
        raise InvalidArgument(
            f"{source} {address!r} names no path; write unix:/path or unix:///path", source
        )
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise InvalidArgument(
            f"{source} {address!r} is too long; a socket's path has at most {_SUN_PATH_MAX} bytes",
            source,
        )
    return address


def channel_options(address: str) -> list[tuple[str, str | int]]:
    """Return the gRPC channel arguments for the daemon at `address`."""
    options: list[tuple[str, str | int]] = [
        # The daemon is on this host: an http_proxy in the environment is not meant for it.
        ("grpc.enable_http_proxy", 0),
        # The default of up to two minutes would outlast a daemon's restart.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if _unix_path(address) is not None:
        # gRPC would send the percent-encoded path, which is no host name: servers not built on
        # its C core refuse the request for it.
        options.append(("grpc.default_authority", "localhost"))
    return options


def why_silent(address: str, details: str) -> PeerCredError:
    """Return the error for a call that got no answer from `address`, with `details` from gRPC.

    A unix socket is tried once more, because errno says which of the three it is (missing, stale,
    forbidden) and gRPC's text does not promise to.
    """
    path = _unix_path(address)
    # In an error's text ";" stands before what mends it, and nowhere else.
    details = details.replace(";", ",")
    if path is None:
        return Unavailable(f"no daemon answers at {address} ({details}); {_START}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return Unavailable(f"no daemon at {address}, there is no such socket; {_START}")
        except ConnectionRefusedError:
            return Unavailable(
                f"no daemon at {address}, the socket is stale and nobody listens on it; {_START}"
            )
        except PermissionError:
            return Refused(
                f"you may not connect to {address}; be root, or join the group peercredd "
                "(`sudo usermod -aG peercredd USER`, then log in again)"
            )
        except BlockingIOError:
            return _crowded(address)
        except OSError as error:
            return Unavailable(f"no daemon at {address}, {error.strerror}; {_START}")
    if details.startswith(_NO_CONNECTION):
        return _crowded(address)
    return Unavailable(f"the daemon at {address} broke off the call ({details}); ask again")


def _crowded(address: str) -> Unavailable:
    return Unavailable(f"the daemon at {address} has as many connections as it takes; ask again")


def _unix_path(address: str) -> str | None:
    if not address.startswith("unix:"):
        return None
    return unquote(address.removeprefix("unix:").removeprefix("//"))
