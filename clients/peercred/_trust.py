"""Whether who serves at an address is the daemon: run by root, by its own user, or by one trusted.

What decides is the owner of the socket that listens. On TCP that is what the kernel
shows of it in /proc/net/tcp, which is true for as long as it listens; and a port below
ip_unprivileged_port_start nobody can take without a privilege, so there one look lasts
until the connection breaks. Any other port can change hands between the look and the
connection that gRPC makes, so there it is looked at before and after every call.
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from peercred.errors import InvalidArgument, Refused

ENVIRONMENT_VARIABLE = "PEERCRED_TRUSTED_USER"
SERVICE_USER = "peercredd"

_ROOT = 0
_LISTEN = "0A"
_UCRED = struct.Struct("=iII")  # struct ucred of unix(7)


def trusted_uids(user: str | int | None) -> frozenset[int]:
    """Return the users whose daemon is believed: root, peercredd, and `user` if one is given.

    Without it, the environment's PEERCRED_TRUSTED_USER, if there is one.

    Raises:
        InvalidArgument: There is no such user.

    """
    source = "trusted_user"
    if user is None:
        source = ENVIRONMENT_VARIABLE
        user = os.environ.get(ENVIRONMENT_VARIABLE) or None
    uids = {_ROOT}
    with suppress(KeyError):
        uids.add(pwd.getpwnam(SERVICE_USER).pw_uid)
    if user is not None:
        uids.add(_uid(user, source))
    return frozenset(uids)


def check_path(address: str, path: str, trusted: frozenset[int]) -> None:
    """Look at who made the unix socket at `path`; what cannot be looked at fails to connect, too.

    Your own is believed: what runs as you could as well change this process.

    Raises:
        Refused: It is somebody else's.

    """
    try:
        owner = os.stat(path).st_uid  # noqa: PTH116 - 1 µs of each call, where pathlib takes 5
    except OSError:
        return
    if owner not in trusted and owner != os.geteuid():
        raise _refused(address, owner)


def check_abstract(address: str, name: str, trusted: frozenset[int]) -> None:
    """Connect to an abstract unix socket and see who called listen(), as SO_PEERCRED tells.

    Raises:
        Refused: It is somebody else.

    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"\0{name}")
        except OSError:
            return
        ucred = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    owner = _UCRED.unpack(ucred)[1]
    if owner not in trusted and owner != os.geteuid():
        raise _refused(address, owner)


def check_port(
    address: str, host: IPv4Address | IPv6Address, port: int, trusted: frozenset[int]
) -> bool:
    """Look at who listens on a port of loopback.

    Returns whether somebody does. Where nobody does, a connection fails, too.

    Raises:
        Refused: Somebody does who is not trusted, or the kernel does not tell.

    """
    owners = _owners(address, host, port)
    for owner in owners:
        if owner not in trusted:
            raise _refused(address, owner)
    return bool(owners)


def somebody_listens(host: IPv4Address | IPv6Address, port: int) -> bool:
    """Whether anybody listens there, as far as the kernel tells."""
    with suppress(Refused):
        return bool(_owners("", host, port))
    return False


def is_privileged(port: int) -> bool:
    """Whether nobody may listen there without CAP_NET_BIND_SERVICE."""
    try:
        return port < int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except OSError:
        return False


def _owners(address: str, host: IPv4Address | IPv6Address, port: int) -> set[int]:
    """The uids of all who would be connected to, one of them being the one who is."""
    places: set[bytes]
    if isinstance(host, IPv4Address):
        mapped = bytes(10) + b"\xff\xff"
        places = {host.packed, bytes(4), mapped + host.packed, mapped + bytes(4), bytes(16)}
    else:
        places = {host.packed, bytes(16)}
    try:
        return {uid for place, at, uid in _listening() if at == port and place in places}
    except OSError as error:
        raise Refused(
            f"who serves at {address} cannot be told, {error.filename}: {error.strerror}; "
            "mount /proc, or ask over the unix socket"
        ) from error


def _listening() -> Iterator[tuple[bytes, int, int]]:
    """Address, port and owner's uid of every TCP socket of this thread's that listens."""
    for name in ("tcp", "tcp6"):
        path = Path(f"/proc/thread-self/net/{name}")
        if name == "tcp6" and not path.exists():  # a kernel without IPv6
            return
        with path.open() as table:
            next(table)
            for line in table:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state != _LISTEN:  # those that listen come first
                    break
                words, _, port = local.partition(":")
                yield _address(words), int(port, 16), int(uid)


def _address(words: str) -> bytes:
    """Of what the kernel writes as 32 bit numbers of its own byte order."""
    starts = range(0, len(words), 8)
    return b"".join(struct.pack("=I", int(words[start : start + 8], 16)) for start in starts)


def _uid(user: str | int, source: str) -> int:
    if isinstance(user, int) or (user.isascii() and user.isdecimal()):
        number = int(user)
        if 0 <= number < 2**32 - 1:
            return number
    else:
        with suppress(KeyError, ValueError):
            return pwd.getpwnam(user).pw_uid
    raise InvalidArgument(
        f"{source} {user!r} is no user of this host; give a name that `getent passwd` lists, or "
        "a uid",
        source,
    )


def _refused(address: str, uid: int) -> Refused:
    try:
        name = f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        name = f"uid {uid}"
    return Refused(
        f"who serves at {address} is {name}, and neither root nor {SERVICE_USER}: believe nothing "
        f"it says; if that user runs your daemon, give it as trusted_user, in "
        f"{ENVIRONMENT_VARIABLE} or with --trust-user"
    )
