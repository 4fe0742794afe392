"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import grpc

from peercred import _address, _wire
from peercred.errors import PeerCredError, Refused, Unavailable
from peercred.types import (
    Access,
    Connection,
    ConnectionEvent,
    Namespaces,
    PeerCredentials,
    Status,
)
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1.peer_credentials_pb2_grpc import PeerCredentialsStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Asks the daemon who is at the other end of a localhost TCP connection.

    Cheap to make: it connects at the first question, and again after the daemon was restarted. One
    client serves any number of threads.

    Fork first, then make clients: gRPC's threads stay behind in the parent. gRPC repairs itself in
    the child unless a call is under way in another thread at that moment, or the environment has
    GRPC_ENABLE_FORK_SUPPORT=0; then every call in the child hangs, whatever the timeout.

    Args:
        address: Where the daemon is: ``unix:/path``, or a port of loopback such as
            ``127.0.0.1:338``. Without it, the environment's PEERCRED_ADDRESS, else the best you may
            use: ``unix:/run/peercredd/peercredd.sock`` if you may connect to it, else
            ``127.0.0.1:338`` or ``[::1]:338``.
        timeout: Seconds to wait for each answer of the daemon.
        trusted_user: Name or uid of a user whose daemon is believed, besides root's and
            peercredd's. Without it, the environment's PEERCRED_TRUSTED_USER.

    Every lookup takes `namespaces`: whose process, user and group ids the answers are to have, such
    as ``Namespaces.own()``. Without, they have those of the initial namespaces. The daemon has to
    see a process in each, else the lookup raises `InvalidArgument`.

    Every method raises `Unavailable` where no daemon answers (`DeadlineExceeded` where it does not
    in time), `Refused` where you may not ask or who serves is not to be believed, and
    `PeerCredError` for an answer that lacks what it must have or on a closed client.

    Raises:
        InvalidArgument: The address, the timeout or the user makes no sense.

    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: float = 5.0,
        trusted_user: str | int | None = None,
    ) -> None:
        self._daemon = _address.Daemon(address, trusted_user)
        self.timeout = _wire.checked_timeout(timeout)
        self._closed = False
        self._channels: dict[str, grpc.Channel] = {}
        self._connect()

    @property
    def address(self) -> str:
        """Where it asks; without an address of your own, that may change as daemons come and go."""
        return self._daemon.address

    @property
    def _stub(self) -> PeerCredentialsStub:
        """What to call, which is to be believed; raises Refused where nobody is."""
        if self._daemon.checked() != self._connected_to and not self._closed:
            self._connect()
        return self._connected

    def _connect(self) -> None:
        self._connected_to = address = self._daemon.address
        # Those of addresses left behind stay open, for the calls under way there.
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(
                _address.target(address), options=_address.channel_options(address)
            )
        self._connected = PeerCredentialsStub(self._channels[address])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to the daemon; calls under way in other threads fail."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    def lookup(
        self, sock: _wire.Socket, *, namespaces: Namespaces | None = None
    ) -> PeerCredentials:
        """Who is at the other end of `sock`, a connected TCP socket of this process.

        Asked at the accepting end, who called connect(); at the connecting end, who called
        listen().

        Raises:
            NotFound: Nothing is known of that connection; the reason says why.
            InvalidArgument: The socket is closed, not connected, listening, or no TCP socket.

        """
        key = _wire.key_of_socket(sock)
        try:
            return self._lookup(key, namespaces)
        except PeerCredError as error:
            raise _wire.error_of_lookup(key, error) from error.__cause__

    def lookup_cookie(
        self,
        cookie: int,
        netns_cookie: int | None = None,
        *,
        namespaces: Namespaces | None = None,
    ) -> PeerCredentials:
        """Who is at the other end of the socket with that SO_COOKIE.

        Raises:
            NotFound: Nothing is known of that connection; the reason says why.
            InvalidArgument: A cookie is out of range, or the two do not belong together.

        """
        return self._lookup(_wire.key_of_cookie(cookie, netns_cookie), namespaces)

    def lookup_tuple(
        self,
        local: _wire.Address,
        remote: _wire.Address,
        netns_cookie: int | None = None,
        *,
        namespaces: Namespaces | None = None,
    ) -> PeerCredentials:
        """Who is at the other end of the newest connection between `local` and `remote`.

        Args:
            local: getsockname() of the asking end.
            remote: getpeername() of the asking end.
            netns_cookie: SO_NETNS_COOKIE of the asking end; without it, the daemon's own network
                namespace is meant.
            namespaces: Whose numbers the answer is to have.

        Raises:
            NotFound: Nothing is known of that connection; the reason says why.
            InvalidArgument: These cannot be the two ends of a connection.

        """
        return self._lookup(_wire.key_of_tuple(local, remote, netns_cookie), namespaces)

    def lookup_many(
        self, questions: Iterable[_wire.Question], *, namespaces: Namespaces | None = None
    ) -> list[_wire.Answer]:
        """Who is at the other end of each: a socket, or a (local, remote) pair.

        Returns the answers in the order of the questions. One that fails stands in its place as
        the error that `lookup` or `lookup_tuple` would have raised, and does not fail the others;
        only unknown `namespaces` fail them all. The daemon is asked once for every 1,000.
        """
        answers: list[_wire.Answer] = []
        for batch in _wire.batches(questions, namespaces):
            answers += batch.answers(self._call(self._stub.BatchLookup, batch.request))
        return answers

    def connections(
        self,
        *,
        client_uid: int | None = None,
        server_port: int | None = None,
        netns_cookie: int | None = None,
    ) -> Iterator[Connection]:
        """Yield all recorded connections that pass the filters.

        Which ones is fixed when the iteration starts; one that ends meanwhile may be left out, and
        none comes twice. The timeout is for each part the daemon sends, not for the reader.

        Args:
            client_uid: Only those whose client had this effective user id.
            server_port: Only those to this port.
            netns_cookie: Only those in this network namespace.

        Raises:
            InvalidArgument: A filter is out of its range.

        """
        return self._connections(_wire.list_request(client_uid, server_port, netns_cookie))

    def watch(
        self,
        *,
        client_uid: int | None = None,
        server_port: int | None = None,
        netns_cookie: int | None = None,
    ) -> Iterator[ConnectionEvent]:
        """Yield the connections that pass the filters, then each that comes and goes, for ever.

        First those that are present, then SYNCHRONIZED once. Of each connection there is one event
        PRESENT or ESTABLISHED and, after it, one RETIRED. Who reads too slowly gets MISSED in
        place of some. The timeout is for what is present: later, nothing may happen for long.

        Args:
            client_uid: Only those whose client had this effective user id.
            server_port: Only those to this port.
            netns_cookie: Only those in this network namespace.

        Raises:
            InvalidArgument: A filter is out of its range.

        """
        return self._watch(_wire.watch_request(client_uid, server_port, netns_cookie))

    def status(self) -> Status:
        """Return what the daemon says of itself: its version, its tables, what it had to drop."""
        return _wire.status(self._call(self._stub.GetStatus, pb.GetStatusRequest()))

    def access(self) -> Access:
        """Return who the daemon takes you for, and what you may ask."""
        return _wire.access(self._call(self._stub.WhoAmI, pb.WhoAmIRequest()))

    def _lookup(self, key: pb.ConnectionKey, namespaces: Namespaces | None) -> PeerCredentials:
        request = _wire.lookup_request(key, namespaces)
        return _wire.peer_credentials(self._call(self._stub.Lookup, request), namespaces)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with self._typed_errors():
            answer = method(request, timeout=self.timeout)
        self._daemon.check_again()
        return answer

    def _connections(self, request: pb.ListConnectionsRequest) -> Iterator[Connection]:
        with self._typed_errors():
            call = self._stub.ListConnections(request)
        try:
            while (response := self._in_time(call, call.cancel)) is not None:
                self._daemon.check_again()
                yield from map(_wire.connection, response.connections)
        finally:
            call.cancel()

    def _watch(self, request: pb.WatchConnectionsRequest) -> Iterator[ConnectionEvent]:
        watched = _wire.Watched()
        with self._typed_errors():
            call = self._stub.WatchConnections(request)
        try:
            response = self._in_time(call, call.cancel)
            while response is not None and not response.synchronized:
                self._daemon.check_again()
                yield from watched.events(response)
                response = self._in_time(call, call.cancel)
            while response is not None:
                self._daemon.check_again()
                yield from watched.events(response)
                with self._typed_errors():
                    response = next(call, None)
            raise _wire.ended(self.address)
        finally:
            call.cancel()

    def _in_time(
        self, responses: Iterator[_Response], cancel: Callable[[], object]
    ) -> _Response | None:
        """The next response of a call, None at its end; `cancel` ends the call.

        A deadline of the call would run while the reader is busy with what it got.
        """
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            cancel()

        watchdog = threading.Timer(self.timeout, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            with self._typed_errors():
                return next(responses, None)
        except PeerCredError as error:
            if overdue.is_set():
                raise _wire.no_answer_within(self.address, self.timeout) from error
            raise
        finally:
            watchdog.cancel()

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            if self._closed and error.code() is grpc.StatusCode.CANCELLED:
                raise PeerCredError("the client was closed during the call") from error
            answer = _wire.error_of_call(error, self.address, self.timeout)
            if isinstance(answer, (Unavailable, Refused)):
                self._daemon.doubt()
            raise answer from error
        except ValueError as error:
            raise PeerCredError("the client is closed: make a new one") from error
