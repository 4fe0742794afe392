"""Where the daemon is, how to reach it, whether to believe it, and why nobody answers there."""

from __future__ import annotations

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple
from urllib.parse import unquote

from peercred import _trust
from peercred.errors import InvalidArgument, PeerCredError, Refused, Unavailable

DEFAULT_ADDRESS = "unix:/run/peercredd/peercredd.sock"
DEFAULT_TCP_ADDRESSES = ("127.0.0.1:338", "[::1]:338")
ENVIRONMENT_VARIABLE = "PEERCRED_ADDRESS"

_SUN_PATH_MAX = 107
"""Bytes of a path that ``struct sockaddr_un`` holds beside the closing NUL, unix(7)."""

_ABSTRACT = "unix-abstract:"
_TCP_ADDRESS = re.compile(r"(?:ipv[46]:)?(?P<host>[^:\[\]]+|\[[^\]]*\]):(?P<port>[0-9]{1,5})")

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
        if not address.startswith(_ABSTRACT):
            _endpoint(address, source)
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


class Daemon:
    """Which daemon a client asks: where it is, and whether it is one to be believed.

    Without an address it is the unix socket if it may be connected to, else loopback TCP if
    somebody listens there; and that is decided again after every call that failed.

    Raises:
        InvalidArgument: No daemon can have that address, or there is no such user.

    """

    def __init__(self, address: str | None, trusted_user: str | int | None) -> None:
        self._automatic = address is None and ENVIRONMENT_VARIABLE not in os.environ
        self._trusted = _trust.trusted_uids(trusted_user)
        self._sure = False
        self.address = _choose() if self._automatic else resolve(address)

    def checked(self) -> str:
        """Return the address to ask at, having seen that who serves there may be believed.

        Raises:
            Refused: Somebody else serves there.

        """
        if not self._sure:
            if self._automatic:
                self.address = _choose()
            self._sure = self._is_to_be_believed()
        return self.address

    def check_again(self) -> None:
        """See, after an answer, that it was not somebody else's by now.

        Raises:
            Refused: It may have been.

        """
        if not self._sure:
            self._is_to_be_believed()

    def doubt(self) -> None:
        """Look again before the next call: this one had no answer."""
        self._sure = False

    def _is_to_be_believed(self) -> bool:
        """Raises Refused if not; returns whether that holds until a call fails."""
        address = self.address
        if address.startswith(_ABSTRACT):
            _trust.check_abstract(address, address.removeprefix(_ABSTRACT), self._trusted)
            return True
        path = _unix_path(address)
        if path is not None:
            _trust.check_path(address, path, self._trusted)
            return False
        host, port = _endpoint(address, "address")
        return _trust.check_port(address, host, port, self._trusted) and _trust.is_privileged(port)


def _choose() -> str:
    """The best daemon there is for who asks. None of the default ones: that with the best error."""
    if os.access(unquote(DEFAULT_ADDRESS.removeprefix("unix:")), os.W_OK, effective_ids=True):
        return DEFAULT_ADDRESS
    for address in DEFAULT_TCP_ADDRESSES:
        if _trust.somebody_listens(*_endpoint(address, "address")):
            return address
    return DEFAULT_ADDRESS


class _Port(NamedTuple):
    host: IPv4Address | IPv6Address
    port: int


def _endpoint(address: str, source: str) -> _Port:
    """Read HOST:PORT; raises InvalidArgument unless it is a port of loopback."""
    parts = _TCP_ADDRESS.fullmatch(address)
    if not parts:
        raise InvalidArgument(
            f"{source} {address!r} is no address; write unix:/path or HOST:PORT", source
        )
    host, port = parts["host"].strip("[]"), int(parts["port"])
    try:
        ip = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InvalidArgument(
            f"{source} {address!r} has a host name, and names are not looked up; "
            "write 127.0.0.1:PORT or [::1]:PORT",
            source,
        ) from None
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    if not ip.is_loopback or not 0 < port < 65536:
        raise InvalidArgument(
            f"{source} {address!r} is no port of this host's loopback; write 127.0.0.1:PORT or "
            "[::1]:PORT",
            source,
        )
    return _Port(ip, port)


def target(address: str) -> str:
    """Return what gRPC is to connect to, without looking anything up."""
    if address.startswith("unix"):
        return address
    host, port = _endpoint(address, "address")
    return f"ipv4:{host}:{port}" if isinstance(host, IPv4Address) else f"ipv6:[{host}]:{port}"


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
                f"you may not connect to {address}; ask over loopback TCP "
                f"({DEFAULT_TCP_ADDRESSES[0]}) about what is yours, be root, or join the group "
                "peercredd (`sudo usermod -aG peercredd USER`, then log in again)"
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
