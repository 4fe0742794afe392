"""Questions asked of the BPF maps: which connection, and who is at its other end."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from peercredd.records import Connection, Credentials, Tuple


class Reason(Enum):
    """Why a connection is not found. The values are the API's ErrorInfo reasons."""

    NEVER_SEEN = "NEVER_SEEN"
    OLDER_THAN_CAPTURE = "OLDER_THAN_CAPTURE"
    TABLE_WAS_FULL = "TABLE_WAS_FULL"
    RETIRED = "RETIRED"
    NOT_LOCAL = "NOT_LOCAL"


class Answer(NamedTuple):
    """The other end of a connection."""

    peer: Credentials
    asker_is_server: bool
    """True: the asking end is the accepted socket, `peer` called connect()."""
    tuple: Tuple
    server_socket_cookie: int
    client_socket_cookie: int
    established_time_ns: int


class Table(NamedTuple):
    name: str
    entries: int
    max_entries: int


class Drop(NamedTuple):
    reason: str
    count: int
    description: str


class StoreStatus(NamedTuple):
    hook_set: str
    cgroup: str
    capture_start_time_ns: int
    tables: tuple[Table, ...]
    drops: tuple[Drop, ...]
    missing_fields: tuple[str, ...]


class Store:
    """The pinned maps of a running capture."""

    own_netns_cookie: int

    def find_by_socket(self, cookie: int) -> Answer | Reason: ...
    def find_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Answer | Reason: ...
    def server_cookies(self) -> list[int]: ...
    def connection(self, server_cookie: int) -> Connection | None: ...
    def status(self) -> StoreStatus: ...
    def attachments(self) -> dict[str, bool]: ...
