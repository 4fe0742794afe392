"""``peercred watch``: connections as they come and go."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peercred import Connection, ConnectionEvent, EventKind
from peercred.cli.credentials import UNKNOWN
from peercred.cli.display import escape, print_json, print_line
from peercred.cli.listing import connection_document
from peercred.cli.names import user_name
from peercred.cli.parameters import cookie, port, uid
from peercred.cli.settings import Settings, common_options, pass_settings

HEADER = ("CLIENT", "SERVER", "USER", "PID", "COMMAND", "LISTENER")
LINES_OF_FRAME = 3
"""Of the terminal's height: the count above, the header, and what was left out."""


@click.command(
    epilog="""\b
Examples:
  peercred watch
  peercred watch --port 5432 --lines
  peercred watch --json | jq -c 'select(.event == "established") | .connection.client.uid'"""
)
@click.option("--uid", "client_uid", type=uid, metavar="USER", help="Only clients of this user.")
@click.option(
    "--port", "server_port", type=port, metavar="PORT", help="Only connections to this port."
)
@click.option("--netns-cookie", type=cookie, metavar="N", help="Only this network namespace.")
@click.option("--lines", is_flag=True, help="One line for each event, on a terminal too.")
@common_options
@pass_settings
def watch(
    settings: Settings,
    client_uid: int | None,
    server_port: int | None,
    netns_cookie: int | None,
    lines: bool,
) -> None:
    """Show connections as they come and go, until Ctrl-C.

    On a terminal: the connections that are there now, the newest first. Elsewhere one
    line for each event: the time, then "present" (it was there before), "established"
    or "retired" (it is over at both ends), then the connection as in `peercred list`;
    "synchronized" follows what was present.

    "missed N" says that so many were established and are not shown, because they came
    faster than they could be told.

    With --json each event is one line: {"event", "time", "connection"}; of
    "missed" with "missed", the number since the start.
    """
    with settings.client() as client:
        events = client.watch(
            client_uid=client_uid, server_port=server_port, netns_cookie=netns_cookie
        )
        if settings.json:
            _print_documents(events)
        elif lines or not sys.stdout.isatty():
            _print_lines(events)
        else:
            _show(events)


def _print_documents(events: Iterator[ConnectionEvent]) -> None:
    for event in events:
        document: dict[str, object] = {"event": event.kind, "time": datetime.now().astimezone()}
        if event.connection:
            document["connection"] = connection_document(event.connection)
        if event.kind is EventKind.MISSED:
            document["missed"] = event.missed
        print_json(document)
        sys.stdout.flush()


def _print_lines(events: Iterator[ConnectionEvent]) -> None:
    for event in events:
        words = [datetime.now().isoformat(sep=" ", timespec="milliseconds"), event.kind.value]
        if event.connection:
            client, server, user, pid, command, listener = _cells(event.connection)
            words.append(f"{client} -> {server} {user} pid {pid} ({command}), listener {listener}")
        elif event.kind is EventKind.MISSED:
            words.append(str(event.missed))
        print_line(" ".join(words))
        sys.stdout.flush()


def _show(events: Iterator[ConnectionEvent]) -> None:
    # What is drawn hides the cursor, and has to show it again at Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    view = _View()
    try:
        with Live(console=view.console, get_renderable=view.draw, refresh_per_second=4):
            for event in events:
                view.take(event)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


class _View:
    """The connections that are there, as a table that fits the terminal."""

    def __init__(self) -> None:
        self.console = Console()
        self._connections: dict[int, Connection] = {}
        self._established = 0
        self._missed = 0

    def take(self, event: ConnectionEvent) -> None:
        """Regard an event."""
        self._missed = max(self._missed, event.missed)
        if event.connection is None:
            return
        cookie = event.connection.server_socket_cookie
        if event.kind is EventKind.RETIRED:
            del self._connections[cookie]
        else:
            self._connections[cookie] = event.connection
            self._established += event.kind is EventKind.ESTABLISHED

    def draw(self) -> Group:
        """What the terminal shows now; called from another thread."""
        connections = list(self._connections.values())
        rows = max(1, self.console.height - LINES_OF_FRAME)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in HEADER:
            table.add_column(name, no_wrap=True, overflow="ellipsis", header_style="bold")
        for connection in reversed(connections[-rows:]):
            table.add_row(*(Text(cell) for cell in _cells(connection)))
        head = f"{len(connections)} connections, {self._established} established since the start"
        missed = f", {self._missed} missed" if self._missed else ""
        left_out = len(connections) - rows
        return Group(
            Text(head + missed, "yellow" if missed else ""),
            table,
            Text(f"... and {left_out} older" if left_out > 0 else "", "dim"),
        )


def _cells(connection: Connection) -> tuple[str, ...]:
    client, listener = connection.client, connection.listener
    cells = (
        str(connection.client_endpoint),
        str(connection.server_endpoint),
        user_name(client.uid) or str(client.uid),
        str(client.pid),
        UNKNOWN if client.comm is None else client.comm,
        f"{user_name(listener.uid) or listener.uid} pid {listener.pid}" if listener else UNKNOWN,
    )
    return tuple(map(escape, cells))
