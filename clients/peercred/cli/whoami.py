"""``peercred whoami``: what a server on this host learns about you."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import click

from peercred import Access, Client, NotFound, PeerCredentials, PeerCredError, Scope
from peercred.cli.credentials import document, document_of_peer, print_peer
from peercred.cli.display import print_json, print_line, print_table
from peercred.cli.names import user_name
from peercred.cli.settings import Settings, common_options, pass_settings

_SCOPES = {Scope.ALL: "all connections", Scope.OWN: "your own"}


@click.command(
    epilog="""\b
Examples:
  peercred whoami
  sudo -u www-data peercred whoami --json | jq .uid_name"""
)
@click.option("--ipv6", is_flag=True, help="Connect over ::1 in place of 127.0.0.1.")
@common_options
@pass_settings
def whoami(settings: Settings, ipv6: bool) -> None:
    """Show what a server on this host learns about you, and what you may ask.

    Connects to a port of its own and asks the daemon about the accepted socket; and asks
    whom it takes you for.

    MAY ASK ABOUT is "all connections", or "your own": those that you serve (you
    called listen() or accept()), and of those that you made who listens. Any other
    is not found. With --json that is "access".
    """
    with settings.client() as client:
        try:
            access = client.access()
            peer = ask_about_myself(client, ipv6=ipv6)
        except NotFound as error:
            raise NotFound(
                f"{error}; run this in the captured cgroup, which `peercred status` names",
                error.reason,
            ) from error
        except OSError as error:
            raise PeerCredError(
                f"this host does not let you connect to itself: {error.strerror}; bring the "
                "loopback interface up: `ip link set lo up`"
            ) from error
        asked_at = client.address
    if settings.json:
        print_json(document_of_peer(peer) | {"access": _document(access, asked_at)})
    else:
        print_peer(peer, as_json=False)
        print_line("")
        print_table(list(_rows(access, asked_at)))


def _document(access: Access, asked_at: str) -> dict[str, object]:
    caller = access.caller
    return {
        "address": asked_at,
        "transport": access.transport.value,
        "scope": access.scope.value,
        "reason": access.reason,
        "listener_details": access.listener_details,
        "caller": document(caller) if caller else None,
    }


def _rows(access: Access, asked_at: str) -> Iterator[tuple[str, str]]:
    caller = access.caller
    yield "asked over", f"{access.transport.value} ({asked_at})"
    if caller is None:
        yield "daemon takes you for", "somebody whom the socket's permissions let in"
    else:
        name = user_name(caller.uid) or "no name"
        yield "daemon takes you for", f"{caller.uid} ({name}), process {caller.pid}"
    yield "may ask about", _SCOPES[access.scope]
    yield "because", access.reason
    details = "all" if access.listener_details else "pid, user and groups"
    yield "of others' listeners", details


def ask_about_myself(client: Client, *, ipv6: bool = False) -> PeerCredentials:
    """Connect to a listener of our own and look up the accepted socket.

    Raises OSError when the loopback address is missing, and what `Client.lookup` raises.
    """
    family, address = (socket.AF_INET6, "::1") if ipv6 else (socket.AF_INET, "127.0.0.1")
    with (
        socket.create_server((address, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as connection,
        _accept(listener, connection.getsockname()) as accepted,
    ):
        return client.lookup(accepted)


def _accept(listener: socket.socket, client: tuple[object, ...]) -> socket.socket:
    # Any local user may have connected to the port meanwhile: that is not our connection.
    while True:
        accepted, peer = listener.accept()
        if peer == client:
            return accepted
        accepted.close()
