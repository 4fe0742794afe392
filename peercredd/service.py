"""The answers of peercred.v1.PeerCredentials, whatever carries them.

Request messages in, response messages out, or `RequestError`. Nothing here
knows of gRPC, threads or event loops: what takes long comes in pages, between
which a server can turn to others.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from google.rpc import code_pb2
from google.rpc.status_pb2 import Status

import peercredd
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import encode, keys
from peercredd.access import ON_UNIX_SOCKET, Access, Refusals
from peercredd.figures import FOUND, Figures
from peercredd.processes import NamespaceUnknown, SupervisorSilent
from peercredd.processes import Processes as LocalProcesses
from peercredd.records import V4_MAPPED, Connection
from peercredd.store import Answer, Attachment, Reason, StoreStatus
from peercredd.translation import INITIAL, Processes, Viewpoint

MAX_BATCH_KEYS = 1000
PAGE = 100
"""Connections looked up in one go: about a millisecond."""

_NOT_FOUND = {
    reason: encode.error(code_pb2.NOT_FOUND, reason.value, text)
    for reason, text in {
        Reason.NEVER_SEEN: "no connect() of that connection on this host was recorded",
        Reason.OLDER_THAN_CAPTURE: "that connection, or the listener asked about, was there "
        "before capture began",
        Reason.TABLE_WAS_FULL: "that connection was seen, and there was no room to record it, in "
        "a table or in one user's share of it; see 'peercred status'",
        Reason.RETIRED: "that connection was recorded and has been closed since",
        Reason.NOT_LOCAL: "one end of that connection is not an address of this host",
        Reason.NOT_VISIBLE: "there is no such connection, or none that you may learn about; "
        "'peercred whoami' shows what you may ask",
    }.items()
}
CAPTURE_LOST = "CAPTURE_LOST"
_CAPTURE_LOST = encode.error(
    code_pb2.UNAVAILABLE,
    CAPTURE_LOST,
    "nothing is known of that connection, and capture is not in place; restart peercredd",
)


class RequestError(Exception):
    """A request that gets no answer; `status` is the google.rpc.Status to send instead."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


class View(Protocol):
    """The part of the capture that the callers of one listener may learn about.

    The Store is the view of a caller who may see everything. For callers who may
    not, pass an object that leaves out what is not theirs.
    """

    @property
    def own_netns_cookie(self) -> int:
        """Of the network namespace that a tuple without one is looked for in."""

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        """Find the other end of a socket's connection."""

    def find_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Answer | Reason:
        """Find the other end of the newest connection between two endpoints."""

    def pages(self, size: int) -> Iterator[Iterable[Connection]]:
        """Yield all connections, about so many at a time."""

    def shown(self, connection: Connection) -> Connection | None:
        """Return a connection as the callers may see it, None if they may not."""

    def status(self) -> StoreStatus:
        """Return what the capture says of itself."""

    def is_attached(self) -> bool:
        """Return whether every program is in its place now."""

    def problems(self) -> list[str]:
        """Return what keeps answers from being complete now, a line each for people."""

    def attachments(self) -> dict[str, Attachment]:
        """Return for each program whether it is in its place now, and how often it ran."""


class PeerCredentialsService:
    """Answers out of one view; make one for each listener, or each caller: it is cheap.

    Every method raises `RequestError`.
    """

    def __init__(
        self,
        view: View,
        access: Access = ON_UNIX_SOCKET,
        refusals: Refusals | None = None,
        processes: Processes | None = None,
        daemon_pid: int | None = None,
        figures: Figures | None = None,
    ) -> None:
        """Answer callers with this access, whose view it is.

        Args:
            view: what they may learn about.
            access: what they are told of that.
            refusals: what callers on loopback TCP did not get.
            processes: who knows the namespaces of processes; None looks into /proc, as root can.
            daemon_pid: of the process that administrators signal; None for this one.
            figures: where lookups are counted.
        """
        self._view = view
        self._access = access
        self._refusals = refusals or Refusals()
        self._processes = processes or LocalProcesses()
        self._daemon_pid = daemon_pid or os.getpid()
        self.figures = figures or Figures()

    def lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        """Answer one key."""
        response = pb.LookupResponse()
        try:
            viewpoint = self._viewpoint(request)
            self._answer(request.key, response, viewpoint, self.capture_in_place)
        except keys.InvalidKey as error:
            raise RequestError(_invalid("key", error)) from None
        return response

    def lookup_stream(self, request: pb.LookupStreamRequest) -> pb.LookupStreamResponse:
        """Answer one key of a stream; raises nothing, an error is a result."""
        response = pb.LookupStreamResponse()
        try:
            viewpoint = self._viewpoint(request)
        except RequestError as error:
            response.result.error.CopyFrom(error.status)
        else:
            self._result(request.key, "key", response.result, viewpoint, self.capture_in_place)
        return response

    def batch_lookup(self, request: pb.BatchLookupRequest) -> Iterator[pb.BatchLookupResponse]:
        """Yield the answers in the order of the keys, in pages to be merged into one response."""
        if len(request.keys) > MAX_BATCH_KEYS:
            raise RequestError(
                encode.error(
                    code_pb2.INVALID_ARGUMENT,
                    "TOO_MANY_KEYS",
                    f"keys: {len(request.keys)} of them, at most {MAX_BATCH_KEYS} in one call",
                    "keys",
                )
            )
        viewpoint = self._viewpoint(request)
        for start in range(0, len(request.keys), PAGE):
            page = pb.BatchLookupResponse()
            add_result = page.results.add
            capture_in_place = functools.cache(self.capture_in_place)
            for index, key in enumerate(request.keys[start : start + PAGE], start):
                self._result(key, f"keys[{index}]", add_result(), viewpoint, capture_in_place)
            yield page

    def list_connections(
        self, request: pb.ListConnectionsRequest
    ) -> Iterator[pb.ListConnectionsResponse]:
        """Yield the connections that pass the filters, in pages.

        A page may be empty, then there is nothing to send.
        """
        passes = _filter(request)
        for found in self._view.pages(PAGE):
            page = pb.ListConnectionsResponse()
            for connection in filter(passes, found):
                encode.connection(page.connections.add(), connection)
            yield page

    def shown(
        self, request: pb.ListConnectionsRequest | pb.WatchConnectionsRequest
    ) -> Callable[[Connection], Connection | None]:
        """Return what makes of a connection that which the caller is to be shown, or None."""
        passes = _filter(request)

        def shown(connection: Connection) -> Connection | None:
            return self._view.shown(connection) if passes(connection) else None

        return shown

    @property
    def sees_all(self) -> bool:
        """Whether the caller may learn about every connection."""
        return self._access.sees_all

    def get_status(self, _: pb.GetStatusRequest) -> pb.GetStatusResponse:
        """Say what runs, since when, how full the tables are and what was dropped."""
        response = pb.GetStatusResponse(
            version=peercredd.__version__,
            kernel_release=os.uname().release,
            daemon_pid=self._daemon_pid,
            server_pid=os.getpid(),
            netns_cookie=self._view.own_netns_cookie,
        )
        try:
            encode.capture(response, self._view.status())
        except SupervisorSilent as error:
            raise RequestError(_silent(error)) from None
        response.scope = encode.scope(self._access)
        if self._access.sees_all:
            encode.refusals(response, self._refusals)
        for program, state in self._view.attachments().items():
            encode.attachment(response.attachments.add(), program, state)
        # Last: what the lines above could not do is among them.
        response.problems.extend(self.problems())
        return response

    def who_am_i(self, _: pb.WhoAmIRequest) -> pb.WhoAmIResponse:
        """Say who the daemon takes the caller for, and what that caller may ask."""
        response = pb.WhoAmIResponse()
        encode.access(response, self._access)
        return response

    def problems(self) -> list[str]:
        """Why the health service says NOT_SERVING, a line each; empty while all is well."""
        return self._view.problems()

    def capture_in_place(self) -> bool:
        """Whether every program is attached, asked of the kernel now."""
        return self._view.is_attached()

    def _viewpoint(
        self, request: pb.LookupRequest | pb.LookupStreamRequest | pb.BatchLookupRequest
    ) -> Viewpoint | None:
        """Whose numbers to answer in; None for those of the initial namespaces, as recorded."""
        if not request.HasField("namespaces"):
            return None
        try:
            for asked, namespace in request.namespaces.ListFields():
                initial = getattr(INITIAL, asked.name)
                if namespace != initial and not self._access.may_name(asked.name, namespace):
                    raise NamespaceUnknown(asked.name, namespace)
            return Viewpoint(request.namespaces, self._processes)
        except NamespaceUnknown as error:
            field = f"namespaces.{error.field}"
            raise RequestError(
                encode.error(
                    code_pb2.INVALID_ARGUMENT, "NAMESPACE_UNKNOWN", f"{field}: {error}", field
                )
            ) from None
        except SupervisorSilent as error:
            raise RequestError(_silent(error)) from None

    def _result(
        self,
        message: pb.ConnectionKey,
        field: str,
        result: pb.LookupResult,
        viewpoint: Viewpoint | None,
        capture_in_place: Callable[[], bool],
    ) -> None:
        try:
            self._answer(message, result.found, viewpoint, capture_in_place)
        except keys.InvalidKey as error:
            result.error.CopyFrom(_invalid(field, error))
        except RequestError as error:
            result.error.CopyFrom(error.status)

    def _answer(
        self,
        message: pb.ConnectionKey,
        response: pb.LookupResponse,
        viewpoint: Viewpoint | None,
        capture_in_place: Callable[[], bool],
    ) -> None:
        key = keys.parse(message)
        found: Answer | Reason
        if key.socket_cookie is not None:
            # What the cookie says is final. The tuple may be another connection's by now.
            basis = pb.BASIS_SOCKET
            found = self._view.find_by_socket(key.socket_cookie)
            if isinstance(found, Answer):
                _require_agreement(key, found)
        else:
            basis = pb.BASIS_TUPLE
            assert key.endpoints is not None
            netns_cookie = key.netns_cookie or self._view.own_netns_cookie
            found = self._view.find_by_tuple(netns_cookie, *key.endpoints)
        if isinstance(found, Reason):
            # Of one that may not be learnt about as much is asked as of one that is not there.
            if found in (Reason.NEVER_SEEN, Reason.NOT_VISIBLE):
                if not capture_in_place():
                    self.figures.lookups[CAPTURE_LOST] += 1
                    raise RequestError(_CAPTURE_LOST)
                if self._leaves_the_host(key):
                    found = Reason.NOT_LOCAL
            self.figures.lookups[found.value] += 1
            raise RequestError(_NOT_FOUND[found])
        self.figures.lookups[FOUND] += 1
        encode.answer(response, found, basis)
        if viewpoint:
            viewpoint.translate(response, found.peer, found.acceptor)

    def _leaves_the_host(self, key: keys.Key) -> bool:
        netns_cookie = key.netns_cookie
        if netns_cookie is None and key.socket_cookie is None:
            netns_cookie = self._view.own_netns_cookie
        # Of other namespaces' addresses nothing is known here.
        if key.endpoints is None or netns_cookie != self._view.own_netns_cookie:
            return False
        return not (_is_local(key.endpoints.remote) and _is_local(key.endpoints.local))


def _require_agreement(key: keys.Key, found: Answer) -> None:
    ends = found.tuple
    if key.netns_cookie is not None and key.netns_cookie != ends.netns_cookie:
        field = "netns_cookie"
    elif key.endpoints is None:
        return
    else:
        server = ends.server_address, ends.server_port
        client = ends.client_address, ends.client_port
        local, remote = (server, client) if found.asker_is_server else (client, server)
        if key.endpoints[:2] != local:
            field = "local"
        elif key.endpoints[2:] != remote:
            field = "remote"
        else:
            return
    raise keys.InvalidKey(field, "not that of the socket named by socket_cookie", "KEYS_DISAGREE")


def _silent(error: SupervisorSilent) -> Status:
    return encode.error(code_pb2.UNAVAILABLE, "SUPERVISOR_SILENT", str(error))


def _invalid(prefix: str, error: keys.InvalidKey) -> Status:
    field = f"{prefix}.{error.field}" if error.field else prefix
    return encode.error(code_pb2.INVALID_ARGUMENT, error.reason, f"{field}: {error.text}", field)


def _filter(
    request: pb.ListConnectionsRequest | pb.WatchConnectionsRequest,
) -> Callable[[Connection], bool]:
    """What tells whether a connection passes the filters of a request."""
    if request.HasField("server_port") and not 0 < request.server_port < 65536:
        raise RequestError(
            encode.error(
                code_pb2.INVALID_ARGUMENT,
                "INVALID_FILTER",
                f"server_port: {request.server_port} is not between 1 and 65535",
                "server_port",
            )
        )
    client_uid = request.client_uid if request.HasField("client_uid") else None
    server_port = request.server_port if request.HasField("server_port") else None
    netns_cookie = request.netns_cookie if request.HasField("netns_cookie") else None

    def passes(connection: Connection) -> bool:
        ends = connection.tuple
        return (
            client_uid in (None, connection.client.euid)
            and server_port in (None, ends.server_port)
            and netns_cookie in (None, ends.netns_cookie)
        )

    return passes


def _is_local(address: bytes) -> bool:
    """Whether the kernel lets a socket have that 16-byte address here."""
    family, text = socket.AF_INET6, encode.address_text(address)
    if address.startswith(V4_MAPPED):
        family = socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((text, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True
