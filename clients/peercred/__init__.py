"""Who is at the other end of a localhost TCP connection, as peercredd knows it.

    with peercred.Client() as client:
        peer = client.lookup(accepted_socket)
        print(peer.uid, peer.gid, peer.pid)

The daemon must run; this library needs neither root nor BCC.
"""

from peercred.aio import AsyncClient
from peercred.client import Client
from peercred.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PeerCredError,
    Refused,
    Unavailable,
)
from peercred.types import (
    Attachment,
    Basis,
    Connection,
    ConnectionEvent,
    Credentials,
    Drop,
    End,
    Endpoint,
    EventKind,
    Namespaces,
    PeerCredentials,
    SoPeercred,
    Status,
    Table,
    UnusedHookSet,
)

__all__ = [
    "AsyncClient",
    "Attachment",
    "Basis",
    "Client",
    "Connection",
    "ConnectionEvent",
    "Credentials",
    "DeadlineExceeded",
    "Drop",
    "End",
    "Endpoint",
    "EventKind",
    "InvalidArgument",
    "Namespaces",
    "NotFound",
    "PeerCredError",
    "PeerCredentials",
    "Refused",
    "SoPeercred",
    "Status",
    "Table",
    "Unavailable",
    "UnusedHookSet",
]
