"""``peercred list``: the recorded connections."""

from __future__ import annotations

from dataclasses import asdict

import click

from peercred import Connection
from peercred.cli.credentials import UNKNOWN, document
from peercred.cli.display import print_json, print_table
from peercred.cli.names import user_name
from peercred.cli.parameters import cookie, port, uid
from peercred.cli.settings import Settings, common_options, pass_settings

HEADER = (
    "CLIENT",
    "SERVER",
    "UID",
    "USER",
    "PID",
    "LISTENER-UID",
    "LISTENER-PID",
    "NETNS-COOKIE",
    "COOKIE",
    "COMMAND",
)


@click.command(
    "list",
    epilog="""\b
Examples:
  peercred list
  peercred list --uid alice --port 8080
  peercred list --json | jq '.connections[] | [.client.uid, .server_endpoint.port]'""",
)
@click.option("--uid", "client_uid", type=uid, metavar="USER", help="Only clients of this user.")
@click.option(
    "--port", "server_port", type=port, metavar="PORT", help="Only connections to this port."
)
@click.option("--netns-cookie", type=cookie, metavar="N", help="Only this network namespace.")
@common_options
@pass_settings
def list_connections(
    settings: Settings, client_uid: int | None, server_port: int | None, netns_cookie: int | None
) -> None:
    """List the connections that are recorded now, one per line.

    UID, USER, PID and COMMAND are the client's, at its connect(). COOKIE is
    that of the server's socket: `peercred lookup --cookie COOKIE` tells all.
    LISTENER-UID and LISTENER-PID are the server's, at its listen(); "unknown"
    where that was not recorded, because capture began later, say.
    USER may be a name or a number to filter by; "-" in its column: no name.

    With --json: {"connections": [...]}, both ends in full, and who accepted. An
    empty list is an answer like others (exit code 0).
    """
    with settings.client() as client:
        connections = list(
            client.connections(
                client_uid=client_uid, server_port=server_port, netns_cookie=netns_cookie
            )
        )
    if settings.json:
        print_json({"connections": [connection_document(connection) for connection in connections]})
    else:
        print_table([_row(connection) for connection in connections], HEADER)


def connection_document(connection: Connection) -> dict[str, object]:
    """A connection as JSON has it."""
    return asdict(connection) | {
        "client": document(connection.client),
        "listener": document(connection.listener) if connection.listener else None,
        "acceptor": document(connection.acceptor) if connection.acceptor else None,
    }


def _row(connection: Connection) -> tuple[str, ...]:
    client, listener = connection.client, connection.listener
    return (
        str(connection.client_endpoint),
        str(connection.server_endpoint),
        str(client.uid),
        user_name(client.uid) or "-",
        str(client.pid),
        str(listener.uid) if listener else UNKNOWN,
        str(listener.pid) if listener else UNKNOWN,
        str(connection.netns_cookie),
        str(connection.server_socket_cookie),
        UNKNOWN if client.comm is None else client.comm,
    )
