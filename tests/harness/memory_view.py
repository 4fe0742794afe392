"""A capture held in memory: what the service answers from, without a kernel."""

import struct
from collections.abc import Iterable, Iterator

from peercredd.records import (
    HAS_AUDIT_SESSION_ID,
    HAS_CAPABILITIES,
    HAS_CGROUP_ID,
    HAS_LOGIN_UID,
    HAS_NETWORK_NAMESPACE,
    HAS_NO_NEW_PRIVS,
    HAS_PID_NAMESPACE,
    HAS_START_TIME,
    HAS_USER_NAMESPACE,
    V4_MAPPED,
    Connection,
    Credentials,
    Owners,
    Tuple,
)
from peercredd.store import Answer, Attachment, Drop, Reason, Sighting, StoreStatus, Table, Totals

OWN_NETNS = 1
LOOPBACK = V4_MAPPED + bytes([127, 0, 0, 1])

ALL_FIELDS = (
    HAS_NO_NEW_PRIVS
    | HAS_LOGIN_UID
    | HAS_AUDIT_SESSION_ID
    | HAS_CGROUP_ID
    | HAS_PID_NAMESPACE
    | HAS_USER_NAMESPACE
    | HAS_NETWORK_NAMESPACE
    | HAS_START_TIME
    | HAS_CAPABILITIES
)


def credentials(uid: int = 1000, groups: Iterable[int] = (4, 24, 27)) -> Credentials:
    """Every number another one, so that two fields cannot be mixed up unseen."""
    numbers = tuple(groups)
    return Credentials(
        time_ns=9_000_000_001,
        process_start_time_ns=8_000_000_002,
        effective_capabilities=1 << 40 | 3,
        cgroup_id=4242,
        tgid=101,
        tid=102,
        uid=uid + 1,
        gid=uid + 2,
        euid=uid,
        egid=uid + 3,
        suid=uid + 4,
        sgid=uid + 5,
        fsuid=uid + 6,
        fsgid=uid + 7,
        login_uid=uid + 8,
        audit_session_id=77,
        pid_namespace=4026531836,
        user_namespace=4026531837,
        network_namespace=4026531840,
        known=ALL_FIELDS,
        group_count=len(numbers),
        comm=b"client\0junk".ljust(16, b"\0"),
        groups=struct.pack("32I", *(numbers + (0xDEAD,) * 32)[:32]),
        pid_level=0,
        pids=bytes(48),
        charged_uid=uid + 9,
    )


def connection(
    server_cookie: int = 10,
    *,
    client_uid: int = 1000,
    address: bytes = LOOPBACK,
    client_port: int = 50000,
    server_port: int = 8080,
    netns_cookie: int = OWN_NETNS,
    listener_cookie: int = 30,
    acceptor_uid: int | None = None,
) -> Connection:
    return Connection(
        tuple=Tuple(netns_cookie, address, address, client_port, server_port),
        server_socket_cookie=server_cookie,
        client_socket_cookie=server_cookie + 1_000_000,
        listener_socket_cookie=listener_cookie,
        established_time_ns=9_000_000_003,
        client=credentials(client_uid),
        listener=credentials(2000) if listener_cookie else None,
        acceptor=None if acceptor_uid is None else credentials(acceptor_uid),
    )


class MemoryView:
    """What `peercredd.store.Store` does, out of dictionaries."""

    own_netns_cookie = OWN_NETNS

    def __init__(self, *connections: Connection) -> None:
        self.connections = {found.server_socket_cookie: found for found in connections}
        self.reasons: dict[int, Reason] = {}
        self.attached = {"connect4": True, "sock_ops": True}
        self.counts: dict[str, tuple[int | None, int | None]] = {}
        """Runs and missed runs, of the programs that have such figures."""
        self.attachments_asked = 0
        self.spent = 0
        """How often a search was made as long as the longest one."""

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        for found in self.connections.values():
            if cookie == found.server_socket_cookie:
                return _answer(found, asker_is_server=True)
            if cookie == found.client_socket_cookie:
                return _answer(found, asker_is_server=False)
        return self.reasons.get(cookie, Reason.NEVER_SEEN)

    def find_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Answer | Reason:
        for found in self.connections.values():
            if found.tuple == (netns_cookie, remote, local, remote_port, local_port):
                return _answer(found, asker_is_server=True)
            if found.tuple == (netns_cookie, local, remote, local_port, remote_port):
                return _answer(found, asker_is_server=False)
        return Reason.NEVER_SEEN

    def sight_by_socket(self, cookie: int) -> Sighting:
        for found in self.connections.values():
            if cookie == found.server_socket_cookie:
                return sighting(found, True, 1, 0)
            if cookie == found.client_socket_cookie:
                return sighting(found, False, 1, 1)
        return sighting(None, False, 0, 2)

    def sight_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Sighting:
        for found in self.connections.values():
            if found.tuple == (netns_cookie, remote, local, remote_port, local_port):
                return sighting(found, True, 2, 0)
            if found.tuple == (netns_cookie, local, remote, local_port, remote_port):
                return sighting(found, False, 2, 1)
        return sighting(None, False, 0, 2)

    def spend(self, sighting: Sighting, present: int) -> None:
        self.spent += 1

    def pages(self, size: int) -> Iterator[list[Connection]]:
        cookies = list(self.connections)
        for start in range(0, len(cookies), size):
            page = cookies[start : start + size]
            yield [self.connections[each] for each in page if each in self.connections]

    def has_connection(self, server_cookie: int) -> bool:
        return server_cookie in self.connections

    def shown(self, connection: Connection) -> Connection:
        return connection

    def totals(self) -> Totals:
        return Totals(established=7, retired=6)

    def events_lost(self) -> int:
        return 0

    def status(self, *, everything: bool = True) -> StoreStatus:
        status = StoreStatus(
            hook_set="cgroup",
            cgroup="",
            capture_start_time_ns=5_000_000_000,
            tables=(),
            drops=(),
            missing_fields=("login_uid",),
            unused_hook_sets={"trace": "the kernel cannot attach to tcp_connect"},
        )
        if not everything:
            return status
        return status._replace(
            cgroup="/sys/fs/cgroup",
            tables=(Table("connections", len(self.connections), 131072, 32768),),
            drops=(Drop("PENDING_FULL", 0, "no room"), Drop("OTHER_SYN", 3, "another SYN")),
        )

    def is_attached(self) -> bool:
        self.attachments_asked += 1
        return bool(self.attached) and all(self.attached.values())

    def problems(self) -> list[str]:
        self.attachments_asked += 1
        if not self.attached:
            return ["nothing is attached"]
        return [f"{each} is detached" for each, attached in self.attached.items() if not attached]

    def attachments(self) -> dict[str, Attachment]:
        return {
            program: Attachment(attached, *self.counts.get(program, (None, None)))
            for program, attached in self.attached.items()
        }


class MemorySighting(Sighting):
    """One of a connection that is in memory."""

    found: Connection | None

    def owners(self) -> Owners | None:
        if self.found is None:
            return None
        return (
            self.found.client.euid,
            self.found.listener.euid if self.found.listener else None,
            self.found.acceptor.euid if self.found.acceptor else None,
        )

    def answer(self) -> Answer | Reason:
        if self.found is None:
            return Reason.NEVER_SEEN
        return _answer(self.found, asker_is_server=self.asker_is_server)


def sighting(found: Connection | None, asker_is_server: bool, hits: int, misses: int) -> Sighting:
    made = MemorySighting(None, asker_is_server, hits, misses)
    made.found = found
    return made


def _answer(found: Connection, *, asker_is_server: bool) -> Answer:
    peer = found.client if asker_is_server else found.listener
    assert peer is not None
    return Answer(
        peer=peer,
        asker_is_server=asker_is_server,
        tuple=found.tuple,
        server_socket_cookie=found.server_socket_cookie,
        client_socket_cookie=found.client_socket_cookie,
        established_time_ns=found.established_time_ns,
        acceptor=found.acceptor,
    )
