"""``peercred whoami``: what a server on this host learns about you."""

from __future__ import annotations

import socket

import click

from peercred import Client, NotFound, PeerCredentials, PeerCredError
from peercred.cli.credentials import print_peer
from peercred.cli.settings import Settings, common_options, pass_settings


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
    """Show what a server on this host learns about you.

    Connects to a port of its own and asks the daemon about the accepted socket.
    """
    with settings.client() as client:
        try:
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
    print_peer(peer, as_json=settings.json)


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
