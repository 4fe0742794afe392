"""Command line words read strictly: endpoints, cookies, ports, users, processes.

Each function raises click.BadParameter, which says what is wrong and what would be right.
"""

from __future__ import annotations

import pwd
import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address

import click

from peercred import Endpoint, InvalidArgument, Namespaces

# (uid_t)-1 is the kernel's "no user".
MAX_UID = 2**32 - 2

# PID_MAX_LIMIT of the kernel, 64 bit.
MAX_PID = 2**22

FORMS = "write 127.0.0.1:8080 or [::1]:8080"


def endpoint(text: str) -> Endpoint:
    """Read ``IPV4:PORT`` or ``[IPV6]:PORT``; a v4-mapped address becomes the IPv4 one."""
    host, colon, after = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or text.endswith("]"):
        raise click.BadParameter(f"{text!r} has no port; {FORMS}")
    if ":" in host and not bracketed:
        raise click.BadParameter(f"{text!r} lacks the brackets of an IPv6 address; {FORMS}")
    return Endpoint(_ipv6(host[1:-1]) if bracketed else _ipv4(host), port(after))


def port(text: str) -> int:
    """Read a port number."""
    return _number(text, 1, 65535, "a port")


def cookie(text: str) -> int:
    """Read a socket's or a network namespace's cookie."""
    return _number(text, 1, 2**64 - 1, "a cookie")


def uid(text: str) -> int:
    """Read a numeric uid, or a user's name known on this host."""
    if text.isdigit():
        return _number(text, 0, MAX_UID, "a uid")
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise click.BadParameter(
            f"no user is named {text!r}; `getent passwd` lists the names"
        ) from None


def namespaces_of_process(text: str) -> Namespaces:
    """Read a process's id, for the namespaces that it is in now."""
    try:
        return Namespaces.of(_number(text, 1, MAX_PID, "a process id"))
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from None


def _number(text: str, least: int, most: int, what: str) -> int:
    # int() alone takes " 1", "+1", "1_0" and the digits of other scripts.
    if not re.fullmatch("0|[1-9][0-9]{,19}", text) or not least <= int(text) <= most:
        raise click.BadParameter(f"{text!r} is not {what}; write a number from {least} to {most}")
    return int(text)


def _ipv4(host: str) -> IPv4Address:
    try:
        return IPv4Address(host)
    except AddressValueError:
        raise click.BadParameter(
            f"{host!r} is not an IPv4 address, and names are not looked up; {FORMS}"
        ) from None


def _ipv6(host: str) -> IPv4Address | IPv6Address:
    try:
        address = IPv6Address(host)
    except AddressValueError:
        raise click.BadParameter(f"{host!r} is not an IPv6 address; {FORMS}") from None
    return address.ipv4_mapped or address
