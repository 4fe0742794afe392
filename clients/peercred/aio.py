"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
import grpc.aio

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

if TYPE_CHECKING:
    from peercred.v1.peer_credentials_pb2_grpc import PeerCredentialsAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """The twin of `Client` for asyncio: the same questions, answers and errors.

    Make it inside the event loop that will use it; any number of that loop's tasks may ask at the
    same time. ``writer.get_extra_info("socket")`` is a socket it can be asked about.

    Args:
        address: Where the daemon is: ``unix:/path``, or a port of loopback such as
            ``127.0.0.1:338``. Without it, the environment's PEERCRED_ADDRESS, else the best you may
            use: ``unix:/run/peercredd/peercredd.sock`` if you may connect to it, else
            ``127.0.0.1:338`` or ``[::1]:338``.
        timeout: Seconds to wait for each answer of the daemon.
        trusted_user: Name or uid of a user whose daemon is believed, besides root's and
            peercredd's. Without it, the environment's PEERCRED_TRUSTED_USER.

    Raises:
        InvalidArgument: The address, the timeout or the user makes no sense.
        PeerCredError: No event loop runs.

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
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise PeerCredError(
                "no event loop runs: make an AsyncClient inside the coroutine that uses it"
            ) from None
        self._closed = False
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._connect()

    @property
    def address(self) -> str:
        """Where it asks; without an address of your own, that may change as daemons come and go."""
        return self._daemon.address

    @property
    def _stub(self) -> PeerCredentialsAsyncStub:
        """What to call, which is to be believed; raises Refused where nobody is."""
        if self._daemon.checked() != self._connected_to and not self._closed:
            self._connect()
        return self._connected

    def _connect(self) -> None:
        self._connected_to = address = self._daemon.address
        # Those of addresses left behind stay open, for the calls under way there.
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(
                _address.target(address), options=_address.channel_options(address)
            )
        self._connected = PeerCredentialsStub(self._channels[address])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection to the daemon; calls under way in other tasks fail."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()

    async def lookup(
        self, sock: _wire.Socket, *, namespaces: Namespaces | None = None
    ) -> PeerCredentials:
        """Who is at the other end of `sock`; see `Client.lookup`."""
        key = _wire.key_of_socket(sock)
        try:
            return await self._lookup(key, namespaces)
        except PeerCredError as error:
            raise _wire.error_of_lookup(key, error) from error.__cause__

    async def lookup_cookie(
        self,
        cookie: int,
        netns_cookie: int | None = None,
        *,
        namespaces: Namespaces | None = None,
    ) -> PeerCredentials:
        """Who is at the other end of the socket with that cookie; see `Client.lookup_cookie`."""
        return await self._lookup(_wire.key_of_cookie(cookie, netns_cookie), namespaces)

    async def lookup_tuple(
        self,
        local: _wire.Address,
        remote: _wire.Address,
        netns_cookie: int | None = None,
        *,
        namespaces: Namespaces | None = None,
    ) -> PeerCredentials:
        """Who is at the other end of that connection; see `Client.lookup_tuple`."""
        return await self._lookup(_wire.key_of_tuple(local, remote, netns_cookie), namespaces)

    async def lookup_many(
        self, questions: Iterable[_wire.Question], *, namespaces: Namespaces | None = None
    ) -> list[_wire.Answer]:
        """Who is at the other end of each; see `Client.lookup_many`."""
        answers: list[_wire.Answer] = []
        for batch in _wire.batches(questions, namespaces):
            answers += batch.answers(await self._call(self._stub.BatchLookup, batch.request))
        return answers

    def connections(
        self,
        *,
        client_uid: int | None = None,
        server_port: int | None = None,
        netns_cookie: int | None = None,
    ) -> AsyncIterator[Connection]:
        """Iterate over recorded connections; see `Client.connections`."""
        return self._connections(_wire.list_request(client_uid, server_port, netns_cookie))

    def watch(
        self,
        *,
        client_uid: int | None = None,
        server_port: int | None = None,
        netns_cookie: int | None = None,
    ) -> AsyncIterator[ConnectionEvent]:
        """Iterate over connections that are there, come and go; see `Client.watch`."""
        return self._watch(_wire.watch_request(client_uid, server_port, netns_cookie))

    async def status(self) -> Status:
        """Return what the daemon says of itself; see `Client.status`."""
        return _wire.status(await self._call(self._stub.GetStatus, pb.GetStatusRequest()))

    async def access(self) -> Access:
        """Return who the daemon takes you for, and what you may ask."""
        return _wire.access(await self._call(self._stub.WhoAmI, pb.WhoAmIRequest()))

    async def _lookup(
        self, key: pb.ConnectionKey, namespaces: Namespaces | None
    ) -> PeerCredentials:
        request = _wire.lookup_request(key, namespaces)
        return _wire.peer_credentials(await self._call(self._stub.Lookup, request), namespaces)

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with self._typed_errors():
            answer = await method(request, timeout=self.timeout)
        self._daemon.check_again()
        return answer

    async def _connections(self, request: pb.ListConnectionsRequest) -> AsyncIterator[Connection]:
        with self._typed_errors():
            call = self._stub.ListConnections(request)
        try:
            responses = aiter(call)
            while (response := await self._in_time(responses)) is not None:
                self._daemon.check_again()
                for message in response.connections:
                    yield _wire.connection(message)
        finally:
            call.cancel()

    async def _watch(self, request: pb.WatchConnectionsRequest) -> AsyncIterator[ConnectionEvent]:
        watched = _wire.Watched()
        with self._typed_errors():
            call = self._stub.WatchConnections(request)
        try:
            responses = aiter(call)
            response = await self._in_time(responses)
            while response is not None and not response.synchronized:
                self._daemon.check_again()
                for event in watched.events(response):
                    yield event
                response = await self._in_time(responses)
            while response is not None:
                self._daemon.check_again()
                for event in watched.events(response):
                    yield event
                with self._typed_errors():
                    response = await anext(responses, None)
            raise _wire.ended(self.address)
        finally:
            call.cancel()

    async def _in_time(self, responses: AsyncIterator[_Response]) -> _Response | None:
        """The next response of a stream, None at its end.

        A deadline of the call would run while the reader is busy with what it got.
        """
        with self._typed_errors():
            async with asyncio.timeout(self.timeout):
                return await anext(responses, None)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            answer = _wire.error_of_call(error, self.address, self.timeout)
            if isinstance(answer, (Unavailable, Refused)):
                self._daemon.doubt()
            raise answer from error
        except TimeoutError as error:
            raise _wire.no_answer_within(self.address, self.timeout) from error
        except grpc.aio.UsageError as error:
            raise PeerCredError("the client is closed: make a new one") from error
        except asyncio.CancelledError as error:
            # Calls on a channel that closes end as if somebody had cancelled their tasks.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise PeerCredError("the client was closed during the call") from error
            raise
