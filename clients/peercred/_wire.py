"""Questions and answers on the wire: sockets to keys, messages to types, statuses to errors.

Shared by the blocking and the asyncio client; nothing in here waits.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC
from ipaddress import IPv6Address, ip_address
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status as RpcStatus
from grpc_status import rpc_status

from peercred._address import why_silent
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
from peercred.v1 import peer_credentials_pb2 as pb

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

Socket: TypeAlias = "socket.socket | TransportSocket"
Address: TypeAlias = Endpoint | tuple[str, int] | tuple[str, int, int, int]
"""One end of a connection, as getsockname() gives it or as an Endpoint."""
Question: TypeAlias = "Socket | tuple[Address, Address]"
Answer: TypeAlias = PeerCredentials | PeerCredError

MAX_KEYS = 1000
"""Keys that one BatchLookup takes."""

# asm-generic/socket.h; the socket module has neither.
_SO_COOKIE = 57
_SO_NETNS_COOKIE = 71

_MAX_TIMEOUT = 1_000_000_000
"""Seconds. gRPC takes one whose end is beyond 64 bits of ns since 1970 for none at all."""

_MAX_TEXT = 800
"""Characters of what the daemon says that an error repeats."""

_UNSET_ID = 2**32 - 1
"""(uid_t)-1, which nobody has."""

_ENDS = {pb.END_CLIENT: End.CLIENT, pb.END_SERVER: End.SERVER}
_SCOPES = {pb.SCOPE_ALL: Scope.ALL, pb.SCOPE_OWN: Scope.OWN}
_TRANSPORTS = {
    pb.TRANSPORT_UNIX_SOCKET: Transport.UNIX_SOCKET,
    pb.TRANSPORT_LOOPBACK_TCP: Transport.LOOPBACK_TCP,
}
_BASES = {pb.BASIS_SOCKET: Basis.SOCKET, pb.BASIS_TUPLE: Basis.TUPLE}


def checked_timeout(seconds: float) -> float:
    """Return `seconds` if it can be waited for.

    Raises:
        InvalidArgument: It is no time, or endless.

    """
    if not 0 < seconds <= _MAX_TIMEOUT:
        raise InvalidArgument(
            f"timeout {seconds!r} cannot be waited for; give more than 0 and at most "
            f"{_MAX_TIMEOUT} seconds",
            "timeout",
        )
    return seconds


def key_of_socket(sock: Socket) -> pb.ConnectionKey:
    """Return the key of the connection that `sock` is one end of.

    A TCP socket is named by its cookie and, as a cross-check, by its addresses. The cookie of an
    MPTCP socket is not that of the subflow the kernel recorded, so only the addresses name it. A
    socket that the other end reset has no peer address any more: only its cookie names it.

    Raises:
        InvalidArgument: `sock` is closed, listening, or no TCP socket.

    """
    try:
        protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        is_stream = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_MPTCP) or not is_stream:
            raise InvalidArgument(
                f"the socket is no TCP socket ({sock.family!r}, {sock.type!r}); ask with another",
                "sock",
            )
        key = pb.ConnectionKey()
        if protocol == socket.IPPROTO_TCP:
            key.socket_cookie = _cookie(sock, _SO_COOKIE)
        try:
            remote = sock.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise InvalidArgument(
                    "the socket listens; ask with a socket that accept() returned", "sock"
                ) from None
            if protocol == socket.IPPROTO_MPTCP:
                raise _not_connected() from None
            return key
        local = sock.getsockname()
        key.netns_cookie = _cookie(sock, _SO_NETNS_COOKIE)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise InvalidArgument("the socket is closed; ask before it is", "sock") from None
        raise InvalidArgument(f"the socket cannot be asked: {error.strerror}", "sock") from error
    key.local.address, key.local.port = local[:2]
    key.remote.address, key.remote.port = remote[:2]
    return key


def key_of_cookie(cookie: int, netns_cookie: int | None) -> pb.ConnectionKey:
    """Return the key of the connection that the socket with that SO_COOKIE is one end of.

    Raises:
        InvalidArgument: A cookie is no unsigned 64 bit number.

    """
    key = pb.ConnectionKey()
    _set(key, "socket_cookie", cookie, "cookie")
    _set(key, "netns_cookie", netns_cookie, "netns_cookie")
    return key


def key_of_tuple(
    local: Address, remote: Address, netns_cookie: int | None = None
) -> pb.ConnectionKey:
    """Return the key of the newest connection between `local` and `remote`.

    Raises:
        InvalidArgument: An argument has not the shape of what it should be.

    """
    key = pb.ConnectionKey()
    _set_endpoint(key.local, local, "local")
    _set_endpoint(key.remote, remote, "remote")
    _set(key, "netns_cookie", netns_cookie, "netns_cookie")
    return key


def lookup_request(key: pb.ConnectionKey, namespaces: Namespaces | None) -> pb.LookupRequest:
    """Return the request for one answer, in the numbers of `namespaces`.

    Raises:
        InvalidArgument: A namespace has no such number.

    """
    return pb.LookupRequest(key=key, namespaces=namespaces_message(namespaces))


def namespaces_message(namespaces: Namespaces | None) -> pb.Namespaces | None:
    """Return what names `namespaces` to the daemon, None for the initial ones.

    Raises:
        InvalidArgument: A namespace has no such number.

    """
    if namespaces is None:
        return None
    message = pb.Namespaces()
    _set(message, "pid_namespace", namespaces.pid, "namespaces.pid")
    _set(message, "user_namespace", namespaces.user, "namespaces.user")
    return message


def list_request(
    client_uid: int | None, server_port: int | None, netns_cookie: int | None
) -> pb.ListConnectionsRequest:
    """Return the request for all connections that pass the filters.

    Raises:
        InvalidArgument: A filter is out of its range.

    """
    request = pb.ListConnectionsRequest()
    _set(request, "client_uid", client_uid, "client_uid")
    _set(request, "server_port", server_port, "server_port")
    _set(request, "netns_cookie", netns_cookie, "netns_cookie")
    return request


def watch_request(
    client_uid: int | None, server_port: int | None, netns_cookie: int | None
) -> pb.WatchConnectionsRequest:
    """Return the request to be told of the connections that pass the filters.

    Raises:
        InvalidArgument: A filter is out of its range.

    """
    request = pb.WatchConnectionsRequest()
    _set(request, "client_uid", client_uid, "client_uid")
    _set(request, "server_port", server_port, "server_port")
    _set(request, "netns_cookie", netns_cookie, "netns_cookie")
    return request


class Watched:
    """The connections a watcher was told of: what is retired is told by its cookie alone."""

    def __init__(self) -> None:
        self._connections: dict[int, Connection] = {}
        self._missed = 0

    def events(self, response: pb.WatchConnectionsResponse) -> Iterator[ConnectionEvent]:
        """Yield what a response says.

        Raises:
            PeerCredError: It lacks what it may not lack, or ends what it never began.

        """
        for event in response.events:
            match event.WhichOneof("event"):
                case "present":
                    yield self._came(EventKind.PRESENT, event.present)
                case "established":
                    yield self._came(EventKind.ESTABLISHED, event.established)
                case "retired":
                    cookie = event.retired.server_socket_cookie
                    gone = self._connections.pop(cookie, None)
                    if gone is None:
                        raise PeerCredError(f"the daemon told of no connection {cookie} that ends")
                    yield ConnectionEvent(kind=EventKind.RETIRED, connection=gone)
                case _:
                    raise PeerCredError(
                        "the daemon tells of something unknown; upgrade this library to the "
                        "daemon's version"
                    )
        if response.synchronized:
            yield ConnectionEvent(kind=EventKind.SYNCHRONIZED)
        if response.missed > self._missed:
            self._missed = response.missed
            yield ConnectionEvent(kind=EventKind.MISSED, missed=self._missed)

    def _came(self, kind: EventKind, message: pb.Connection) -> ConnectionEvent:
        came = connection(message)
        self._connections[came.server_socket_cookie] = came
        return ConnectionEvent(kind=kind, connection=came)


class Batch:
    """Up to MAX_KEYS questions. Those that cannot be asked are answered at once, by their error."""

    def __init__(self, questions: Iterable[Question], namespaces: Namespaces | None) -> None:
        self._namespaces = namespaces
        self._keys: list[pb.ConnectionKey | InvalidArgument] = []
        for question in questions:
            try:
                self._keys.append(_key_of_question(question))
            except InvalidArgument as error:
                self._keys.append(error)

    @property
    def request(self) -> pb.BatchLookupRequest:
        """What to send; without keys there is nothing to ask."""
        return pb.BatchLookupRequest(
            keys=[key for key in self._keys if isinstance(key, pb.ConnectionKey)],
            namespaces=namespaces_message(self._namespaces),
        )

    def answers(self, response: pb.BatchLookupResponse) -> Iterator[Answer]:
        """Yield the answers in the order of the questions.

        Raises:
            PeerCredError: There are not as many results as there were keys.

        """
        asked = sum(isinstance(key, pb.ConnectionKey) for key in self._keys)
        if len(response.results) != asked:
            raise PeerCredError(
                f"the daemon gave {len(response.results)} answers to {asked} questions"
            )
        results = iter(response.results)
        for key in self._keys:
            if isinstance(key, InvalidArgument):
                yield key
            else:
                yield _answer(key, next(results), self._namespaces)


def batches(questions: Iterable[Question], namespaces: Namespaces | None) -> Iterator[Batch]:
    """Cut `questions` into what one BatchLookup takes."""
    remaining = iter(questions)
    while chunk := list(islice(remaining, MAX_KEYS)):
        yield Batch(chunk, namespaces)


def peer_credentials(response: pb.LookupResponse, asked: Namespaces | None) -> PeerCredentials:
    """Decode the answer to one lookup, which is to be in the numbers of `asked`.

    Raises:
        PeerCredError: It lacks what no answer may lack, or has the numbers of other namespaces.

    """
    try:
        peer_end, basis = _ENDS[response.peer_end], _BASES[response.basis]
    except KeyError:
        raise PeerCredError(
            "the daemon's answer does not say which end it is about and what it rests on; "
            "upgrade this library to the daemon's version"
        ) from None
    return PeerCredentials(
        **_fields(response.peer),
        peer_end=peer_end,
        basis=basis,
        namespaces=_namespaces(response.namespaces, asked),
        server_socket_cookie=response.server_socket_cookie,
        client_socket_cookie=response.client_socket_cookie,
        netns_cookie=response.netns_cookie,
        established_time_ns=response.established_time_ns,
        acceptor=Credentials(**_fields(response.acceptor))
        if response.HasField("acceptor")
        else None,
    )


def connection(message: pb.Connection) -> Connection:
    """Decode one recorded connection.

    Raises:
        PeerCredError: It lacks what no connection may lack.

    """
    return Connection(
        client_endpoint=_endpoint(message.client_endpoint),
        server_endpoint=_endpoint(message.server_endpoint),
        client=Credentials(**_fields(message.client)),
        listener=Credentials(**_fields(message.listener)) if message.HasField("listener") else None,
        server_socket_cookie=message.server_socket_cookie,
        client_socket_cookie=message.client_socket_cookie,
        listener_socket_cookie=(
            message.listener_socket_cookie if message.HasField("listener_socket_cookie") else None
        ),
        netns_cookie=message.netns_cookie,
        established_time_ns=message.established_time_ns,
        acceptor=Credentials(**_fields(message.acceptor)) if message.HasField("acceptor") else None,
    )


def _table(message: pb.GetStatusResponse.Table) -> Table:
    share = message.max_entries_per_user if message.HasField("max_entries_per_user") else None
    return Table(message.name, message.entries, message.max_entries, share)


def status(response: pb.GetStatusResponse) -> Status:
    """Decode what the daemon says of itself.

    Raises:
        PeerCredError: It says a time that cannot be.

    """
    try:
        capture_start_time = response.capture_start_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise PeerCredError(
            "the daemon's answer has a time that cannot be as the beginning of the capture; "
            "restart peercredd"
        ) from error
    return Status(
        version=response.version,
        hook_set=response.hook_set,
        kernel_release=response.kernel_release,
        cgroup=response.cgroup,
        capture_start_time=capture_start_time,
        capture_start_time_ns=response.capture_start_time_ns,
        tables=tuple(_table(table) for table in response.tables),
        drops=tuple(Drop(d.reason, d.count, d.description) for d in response.drops),
        missing_fields=tuple(response.missing_fields),
        attachments=tuple(map(_attachment, response.attachments)),
        daemon_pid=response.daemon_pid,
        netns_cookie=response.netns_cookie,
        unused_hook_sets=tuple(
            UnusedHookSet(u.hook_set, u.reason) for u in response.unused_hook_sets
        ),
        so_peercred=tuple(
            SoPeercred(s.target, s.source, s.cgroup or None, s.attached, s.waiting, s.detail)
            for s in response.so_peercred
        ),
        refusals=tuple(Refusal(r.reason, r.count, r.description) for r in response.refusals),
        # A daemon that does not say has none but callers who see all.
        scope=_SCOPES.get(response.scope, Scope.ALL),
        server_pid=response.server_pid,
        problems=tuple(response.problems),
    )


def access(response: pb.WhoAmIResponse) -> Access:
    """Decode who the daemon takes the caller for.

    Raises:
        PeerCredError: It says what this library does not know.

    """
    try:
        transport, scope = _TRANSPORTS[response.transport], _SCOPES[response.scope]
    except KeyError:
        raise PeerCredError(
            "the daemon's answer does not say what you may ask; upgrade this library to the "
            "daemon's version"
        ) from None
    return Access(
        transport=transport,
        scope=scope,
        reason=response.reason,
        caller=Credentials(**_fields(response.caller)) if response.HasField("caller") else None,
        listener_details=response.listener_details,
    )


def error_of_call(error: grpc.RpcError, address: str, timeout: float) -> PeerCredError:
    """Return what a failed call to the daemon at `address` means; `timeout` is in seconds."""
    # What a call raises is a Call too, though its stubs do not know.
    try:
        answer: RpcStatus | None = rpc_status.from_call(cast(grpc.Call, error))
    except (ValueError, DecodeError):  # no Status, or not of this failure
        answer = None
    if answer is not None:
        return _error_of_status(answer)
    code = error.code()
    details = _one_line(error.details() or code.name)
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return why_silent(address, details)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return no_answer_within(address, timeout)
        case _:
            return _error_of_status(RpcStatus(code=code.value[0], message=details))


def ended(address: str) -> Unavailable:
    """Return the error for a daemon at `address` that ended what has no end."""
    return Unavailable(f"the daemon at {address} ended the call; ask again")


def no_answer_within(address: str, timeout: float) -> DeadlineExceeded:
    """Return the error for a daemon at `address` that took longer than `timeout` seconds."""
    return DeadlineExceeded(
        f"the daemon at {address} did not answer within {timeout:g} s; "
        "see whether it is overloaded or stopped, or give a longer timeout"
    )


def error_of_lookup(key: pb.ConnectionKey, error: PeerCredError) -> PeerCredError:
    """Return what `error` means for the socket that `key` was taken from.

    One without a peer address may have been reset, and is found; if it was never seen either, it
    never was connected.
    """
    if isinstance(error, NotFound) and error.reason == "NEVER_SEEN" and not key.HasField("remote"):
        return _not_connected()
    return error


def _not_connected() -> InvalidArgument:
    return InvalidArgument("the socket is not connected", "sock")


def _cookie(sock: Socket, option: int) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, option, 8), sys.byteorder)


def _key_of_question(question: Question) -> pb.ConnectionKey:
    if not isinstance(question, tuple):
        return key_of_socket(question)
    if len(question) != 2:
        raise InvalidArgument(f"no (local, remote) pair: {question!r}", "questions")
    return key_of_tuple(*question)


def _set_endpoint(message: pb.Endpoint, end: Address, name: str) -> None:
    if isinstance(end, Endpoint):
        end = (str(end.address), end.port)
    try:
        message.address, message.port, *_ = end
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is no (address, port) pair: {end!r}", name) from error


def _set(
    message: (
        pb.ConnectionKey | pb.ListConnectionsRequest | pb.WatchConnectionsRequest | pb.Namespaces
    ),
    field: str,
    number: int | None,
    name: str,
) -> None:
    if number is None:
        return
    try:
        setattr(message, field, number)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is out of range: {number!r}", name) from error


def _namespaces(answered: pb.Namespaces, asked: Namespaces | None) -> Namespaces:
    if not answered.HasField("pid_namespace") or not answered.HasField("user_namespace"):
        raise PeerCredError(
            "the daemon's answer does not say whose numbers it has; upgrade the daemon to this "
            "library's version"
        )
    namespaces = Namespaces(pid=answered.pid_namespace, user=answered.user_namespace)
    if asked and (
        asked.pid not in (None, namespaces.pid) or asked.user not in (None, namespaces.user)
    ):
        raise PeerCredError(
            f"the daemon's answer has the numbers of {namespaces}, not of {asked}; upgrade the "
            "daemon to this library's version"
        )
    return namespaces


def _answer(key: pb.ConnectionKey, result: pb.LookupResult, asked: Namespaces | None) -> Answer:
    match result.WhichOneof("result"):
        case "found":
            try:
                return peer_credentials(result.found, asked)
            except PeerCredError as error:
                return error
        case "error":
            return error_of_lookup(key, _error_of_status(result.error))
        case _:
            return PeerCredError("the daemon's answer is empty")


def _error_of_status(answer: RpcStatus) -> PeerCredError:
    info = _error_info(answer)
    message = _one_line(answer.message) or "the daemon does not say why"
    match answer.code:
        case code_pb2.NOT_FOUND:
            return NotFound(message, _one_line(info.reason))
        case code_pb2.INVALID_ARGUMENT:
            return InvalidArgument(message, _one_line(info.metadata["field"]))
        case code_pb2.UNAVAILABLE:
            return Unavailable(message)
        case code_pb2.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case code_pb2.PERMISSION_DENIED | code_pb2.UNAUTHENTICATED:
            return Refused(message)
        case code if code in code_pb2.Code.values():
            name = code_pb2.Code.Name(code)
            return PeerCredError(f"the daemon failed with {name}: {message}")
        case code:
            return PeerCredError(f"the daemon failed with the unknown code {code}: {message}")


def _error_info(answer: RpcStatus) -> ErrorInfo:
    info = ErrorInfo()
    for detail in answer.details:
        try:
            if detail.Unpack(info):
                return info
        except DecodeError:
            continue
    return ErrorInfo()


def _one_line(text: str) -> str:
    r"""`text` as a log may have it: short, and what is not printable as ``\xNN`` or ``\n``."""
    inert = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:_MAX_TEXT]
    )
    return inert if len(inert) <= _MAX_TEXT else inert[:_MAX_TEXT] + "..."


def _attachment(message: pb.GetStatusResponse.Attachment) -> Attachment:
    return Attachment(
        message.program,
        message.attached,
        message.run_count if message.HasField("run_count") else None,
        message.missed_count if message.HasField("missed_count") else None,
    )


def _fields(message: pb.Credentials) -> dict[str, Any]:
    # ListFields leaves out what is absent; the fields have one name here and on the wire.
    fields = {field.name: value for field, value in message.ListFields()}
    for name in ("pid", "uid", "gid"):
        if name not in fields:
            raise PeerCredError(
                f"the daemon's answer has no {name}; take it for unknown, not for 0"
            )
        if fields[name] == _UNSET_ID:
            raise PeerCredError(
                f"the daemon's answer has a {name} that nobody has, -1; take it for unknown"
            )
    if "groups" in fields:
        fields["groups"] = tuple(fields["groups"])
    if "comm" in fields:
        fields["comm"] = fields["comm"].decode("utf-8", "backslashreplace")
    return fields


def _endpoint(message: pb.Endpoint) -> Endpoint:
    text = _one_line(message.address)
    try:
        address = ip_address(text)
    except ValueError as error:
        raise PeerCredError(f"the daemon's answer has no address: {text!r} is none") from error
    if "%" in text or not 0 < message.port < 65536:
        raise PeerCredError(
            f"the daemon's answer has no end of a connection: {text!r}, port {message.port}"
        )
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Endpoint(address, message.port)
