"""Records to messages.

The functions fill a message in place: assigning a finished message to a field
copies it, and a batch of 1,000 answers is where the daemon's time goes.
"""

from __future__ import annotations

import time
from socket import AF_INET, AF_INET6, inet_ntop

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import records
from peercredd.access import Access, Refusals, Refused, Transport
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
    NO_NEW_PRIVS,
    UNSET_ID,
    V4_MAPPED,
    WITHHELD,
    Connection,
    Credentials,
)
from peercredd.store import Answer, Attachment, StoreStatus
from peercredd.translation import INITIAL

ERROR_DOMAIN = "peercred.v1"

_TRANSPORTS = {
    Transport.UNIX_SOCKET: pb.TRANSPORT_UNIX_SOCKET,
    Transport.LOOPBACK_TCP: pb.TRANSPORT_LOOPBACK_TCP,
}


def credentials(message: pb.Credentials, record: Credentials) -> None:
    """Fill `message`; what the kernel did not provide, or has not set, stays absent."""
    known = record.known
    message.pid = record.tgid
    if known & WITHHELD:
        message.uid = record.euid
        message.gid = record.egid
        _groups(message, record)
        return
    message.tid = record.tid
    message.uid = record.euid
    message.gid = record.egid
    message.real_uid = record.uid
    message.real_gid = record.gid
    message.saved_uid = record.suid
    message.saved_gid = record.sgid
    message.filesystem_uid = record.fsuid
    message.filesystem_gid = record.fsgid
    message.comm = record.comm.partition(b"\0")[0]
    message.time_ns = record.time_ns
    _groups(message, record)
    if known & HAS_START_TIME:
        message.process_start_time_ns = record.process_start_time_ns
    if known & HAS_CAPABILITIES:
        message.effective_capabilities = record.effective_capabilities
    if known & HAS_NO_NEW_PRIVS:
        message.no_new_privs = known & NO_NEW_PRIVS != 0
    if known & HAS_LOGIN_UID and record.login_uid != UNSET_ID:
        message.login_uid = record.login_uid
    if known & HAS_AUDIT_SESSION_ID and record.audit_session_id != UNSET_ID:
        message.audit_session_id = record.audit_session_id
    if known & HAS_CGROUP_ID:
        message.cgroup_id = record.cgroup_id
    if known & HAS_PID_NAMESPACE:
        message.pid_namespace = record.pid_namespace
    if known & HAS_USER_NAMESPACE:
        message.user_namespace = record.user_namespace
    if known & HAS_NETWORK_NAMESPACE:
        message.network_namespace = record.network_namespace


def _groups(message: pb.Credentials, record: Credentials) -> None:
    count = record.group_count
    message.group_count = count
    if count > records.MAX_GROUPS:
        message.groups_truncated = True
    message.groups.extend(records.groups(record))


def answer(message: pb.LookupResponse, found: Answer, basis: pb.Basis.ValueType) -> None:
    """Fill `message` with the other end of a connection, in numbers of the initial namespaces."""
    message.peer_end = pb.END_CLIENT if found.asker_is_server else pb.END_SERVER
    message.basis = basis
    credentials(message.peer, found.peer)
    message.server_socket_cookie = found.server_socket_cookie
    message.client_socket_cookie = found.client_socket_cookie
    message.netns_cookie = found.tuple.netns_cookie
    message.established_time_ns = found.established_time_ns
    message.namespaces.CopyFrom(INITIAL)
    if found.acceptor is not None:
        credentials(message.acceptor, found.acceptor)


def connection(message: pb.Connection, record: Connection) -> None:
    """Fill `message` with both ends of a connection."""
    ends = record.tuple
    message.server_socket_cookie = record.server_socket_cookie
    message.client_socket_cookie = record.client_socket_cookie
    if record.listener_socket_cookie:
        message.listener_socket_cookie = record.listener_socket_cookie
    message.netns_cookie = ends.netns_cookie
    message.client_endpoint.address = address_text(ends.client_address)
    message.client_endpoint.port = ends.client_port
    message.server_endpoint.address = address_text(ends.server_address)
    message.server_endpoint.port = ends.server_port
    message.established_time_ns = record.established_time_ns
    credentials(message.client, record.client)
    if record.listener is not None:
        credentials(message.listener, record.listener)
    if record.acceptor is not None:
        credentials(message.acceptor, record.acceptor)


def capture(message: pb.GetStatusResponse, status: StoreStatus) -> None:
    """Fill what is known of the capture: its hook set, what it runs on, its tables and drops."""
    message.hook_set = status.hook_set
    message.cgroup = status.cgroup
    message.capture_start_time_ns = status.capture_start_time_ns
    boot_time_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    message.capture_start_time.FromNanoseconds(boot_time_ns + status.capture_start_time_ns)
    for table in status.tables:
        message.tables.add(
            name=table.name,
            entries=table.entries,
            max_entries=table.max_entries,
            max_entries_per_user=table.max_entries_per_user,
        )
    for drop in status.drops:
        message.drops.add(reason=drop.reason, count=drop.occurrences, description=drop.description)
    message.missing_fields.extend(status.missing_fields)
    for hook_set, reason in status.unused_hook_sets.items():
        message.unused_hook_sets.add(hook_set=hook_set, reason=reason)
    for row in status.so_peercred:
        message.so_peercred.add(**row._asdict())


def scope(of: Access) -> pb.Scope.ValueType:
    """Which connections a caller may learn about."""
    return pb.SCOPE_ALL if of.sees_all else pb.SCOPE_OWN


def refusals(message: pb.GetStatusResponse, refused: Refusals) -> None:
    """Fill what callers did not get; every reason, those with a count of zero too."""
    for reason in Refused:
        message.refusals.add(
            reason=reason.value, count=refused.counts[reason], description=reason.description
        )


def access(message: pb.WhoAmIResponse, of: Access) -> None:
    """Fill `message`; who the caller is stays absent where nobody knows."""
    message.transport = _TRANSPORTS[of.transport]
    message.scope = scope(of)
    message.reason = of.why
    message.listener_details = of.listener_details
    if of.caller is not None:
        credentials(message.caller, of.caller)


def attachment(message: pb.GetStatusResponse.Attachment, program: str, state: Attachment) -> None:
    """Fill `message`; a figure that the kernel does not give stays absent."""
    message.program = program
    message.attached = state.attached
    if state.run_count is not None:
        message.run_count = state.run_count
    if state.missed_count is not None:
        message.missed_count = state.missed_count


def address_text(address: bytes) -> str:
    """Return a 16-byte address as text, a v4-mapped one as IPv4."""
    if address.startswith(V4_MAPPED):
        return inet_ntop(AF_INET, address[12:])
    return inet_ntop(AF_INET6, address)


def error(code: int, reason: str, text: str, field: str = "") -> Status:
    """Return a status with an ErrorInfo (AIP-193); `code` is a google.rpc.Code."""
    info = ErrorInfo(domain=ERROR_DOMAIN, reason=reason)
    if field:
        info.metadata["field"] = field
    detail = AnyMessage()
    detail.Pack(info)
    return Status(code=code, message=text, details=[detail])
