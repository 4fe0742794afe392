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
    Access,
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
    Refusal,
    Scope,
    SoPeercred,
    Status,
    Table,
    Transport,
    UnusedHookSet,
)

__all__ = [
    "Access",
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
    "Refusal",
    "Refused",
    "Scope",
    "SoPeercred",
    "Status",
    "Table",
    "Transport",
    "Unavailable",
    "UnusedHookSet",
]
