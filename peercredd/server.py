"""The gRPC servers: carry `service`, `health` and reflection over a unix socket and loopback TCP.

Each transport has a server of its own, so that strangers on TCP take nothing from the socket.

It is asyncio and not a pool of threads: there every open stream holds a thread,
so a handful of idle clients keeps all others waiting.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import lean
from peercredd.access import Policy, Refusals, Refused
from peercredd.callers import Callers, Context
from peercredd.connections import Connections
from peercredd.defaults import REFUSALS_LOG_SECONDS, STOP_GRACE_SECONDS
from peercredd.health import HealthService
from peercredd.listen import free_loopback_addresses, port_in_use
from peercredd.service import PeerCredentialsService, RequestError, View
from peercredd.store import Store
from peercredd.watching import Hub

MAX_CONCURRENT_CALLS: Final = 1024
"""Beyond it calls fail with RESOURCE_EXHAUSTED."""

MAX_OPEN_STREAMS: Final = 768
"""Of these: streams stay open for as long as their caller likes, and never take all places."""

MAX_CONCURRENT_TCP_CALLS: Final = 512
"""Likewise on loopback TCP: 128 MB, should each of them hold a message of the greatest size. One
user has at most `callers.MAX_CALLS_PER_USER` of them."""

MAX_OPEN_TCP_STREAMS: Final = 384
"""Likewise."""

MAX_CALLS_UNSEEN: Final = 64
"""Calls on loopback TCP that wait for their message while nobody has asked whose they are. Who
calls is asked faster with the message there; of any more it is asked, and counted, at once."""

REQUEST_SECONDS: Final = 10
"""For the message of a call that has one, from its beginning."""

_MAX_MESSAGE: Final = 256 * 1024
"""1,000 keys with the longest addresses take some 150 KB."""

MAX_CONNECTIONS: Final = 4096
"""On the unix socket; an idle one costs some 15 KB. Fewer where the process may not have that many
descriptors."""

MAX_TCP_CONNECTIONS: Final = 2048
"""Likewise on loopback TCP."""

SPARE_DESCRIPTORS: Final = 256
"""What the daemon has open besides connections: maps, links, what it reads."""

MAX_MEMORY: Final = 256 * 1024 * 1024
"""Bytes of the server. Beyond it connections of callers on loopback TCP are closed that have sent
what is not a call: gRPC has no limit for headers that do not end."""

CLOSE_SECONDS: Final = 1.0

_CONNECTIONS_OPTION: Final = "grpc.max_allowed_incoming_connections"

OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_connection_idle_ms", 10 * 60 * 1000),
)

TCP_OPTIONS: Final = (
    # With it, somebody of the daemon's uid could share the port.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_metadata_size", 4096),
    ("grpc.max_concurrent_streams", 32),
    # Strangers hold what they do not use for seconds, not minutes.
    ("grpc.max_connection_idle_ms", 30 * 1000),
    ("grpc.server_handshake_timeout_ms", 5 * 1000),
    # Or gRPC lets a connection send ahead ever more.
    ("grpc.http2.bdp_probe", 0),
)

_PEER_CREDENTIALS = pb.DESCRIPTOR.services_by_name["PeerCredentials"].full_name
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_MALFORMED = Status(code=code_pb2.INVALID_ARGUMENT, message="the message cannot be decoded")
_TOO_MANY_STREAMS = Status(
    code=code_pb2.RESOURCE_EXHAUSTED,
    message="as many streams are open as the daemon takes; ask with single calls, or later",
)
_TOO_SLOW = Status(
    code=code_pb2.DEADLINE_EXCEEDED,
    message=f"the call's message did not come within {REQUEST_SECONDS} s; send it at once",
)
_INTERNAL = Status(code=code_pb2.INTERNAL, message="internal error, see the daemon's log")
_CODES = {code.value[0]: code for code in grpc.StatusCode}

log = structlog.get_logger()

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

Service: TypeAlias = PeerCredentialsService
Admit: TypeAlias = Callable[[Context, bool], Service]
"""Returns what answers a call, told whether that is a ListConnections or a WatchConnections. Raises
RequestError for a caller who gets no answer."""


@dataclass(frozen=True, slots=True)
class LoopbackTcp:
    """Serving everybody at 127.0.0.1 and ::1."""

    store: Store
    port: int
    policy: Policy


def _nothing() -> None:
    """Nothing is to be done."""


@asynccontextmanager
async def serving(
    view: View,
    hub: Hub,
    path: str,
    *,
    tcp: LoopbackTcp | None = None,
    service: Callable[..., Service] = PeerCredentialsService,
    bound: Callable[[], None] = _nothing,
) -> AsyncIterator[None]:
    """Serve on a unix socket, and on `tcp`, for as long as the ``async with`` block runs.

    The block begins when the server accepts connections. On leaving, calls under way get
    STOP_GRACE_SECONDS.

    Args:
        view: what is served on the unix socket.
        hub: tells those who watch.
        path: to bind; see `listen.UnixSocket`.
        tcp: where else.
        service: makes what answers; has the parameters of PeerCredentialsService.
        bound: called when all addresses are bound and nothing has been read from anybody:
            the moment to give up privileges.

    Raises:
        ListenError: a port cannot be had.
    """
    refusals = Refusals()
    max_connections, max_tcp_connections = _connections_with_descriptors()
    service = functools.partial(service, refusals=refusals)
    for_members = service(view)

    def everybody(_context: Context, _lists: bool) -> Service:
        return for_members

    server = grpc.aio.server(
        handlers=handlers(view, hub, Gate(everybody, Places(MAX_OPEN_STREAMS), counts_early=False)),
        options=(*OPTIONS, (_CONNECTIONS_OPTION, max_connections)),
        maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
    )
    server.add_insecure_port(f"unix:{path}")
    servers = [server]
    callers = Callers(tcp.store, tcp.port, tcp.policy, refusals, service) if tcp else None
    if callers:
        servers.append(_listening_on_loopback(callers, hub, max_tcp_connections))
        _warn_if_blind(callers)
    bound()
    tasks = [asyncio.create_task(_log_refusals(refusals))]
    if callers:
        tasks.append(asyncio.create_task(_close_too_much(callers.connections, refusals)))
    try:
        for each in servers:
            await each.start()
        yield
    finally:
        for task in tasks:
            task.cancel()
        refusals.write_log()
        await asyncio.gather(*(each.stop(STOP_GRACE_SECONDS) for each in servers))


def _listening_on_loopback(callers: Callers, hub: Hub, max_connections: int) -> grpc.aio.Server:
    server = grpc.aio.server(
        handlers=handlers(
            callers.store,
            hub,
            Gate(
                callers.begin,
                Places(MAX_OPEN_TCP_STREAMS),
                counts_early=True,
                heard=callers.connections.heard,
            ),
        ),
        options=(*TCP_OPTIONS, (_CONNECTIONS_OPTION, max_connections)),
        maximum_concurrent_rpcs=MAX_CONCURRENT_TCP_CALLS,
    )
    for address in free_loopback_addresses(callers.port):
        try:
            server.add_insecure_port(f"{address}:{callers.port}")
        except RuntimeError:  # gRPC does not say why
            raise port_in_use(address, callers.port) from None
    return server


def _connections_with_descriptors() -> tuple[int, int]:
    """How many connections there may be on each transport; gets descriptors for them."""
    wanted = MAX_CONNECTIONS + MAX_TCP_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS, MAX_TCP_CONNECTIONS
    needed = wanted + SPARE_DESCRIPTORS
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(0, min(wanted, soft - SPARE_DESCRIPTORS))
    if room < wanted:
        log.warning(
            "there can be fewer connections than else; raise LimitNOFILE= of the service",
            files=soft,
            needed=needed,
        )
    return max(1, room * MAX_CONNECTIONS // wanted), max(1, room * MAX_TCP_CONNECTIONS // wanted)


class Places:
    """How many streams are open, and how many may be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Take a place for a stream. Raises RequestError where there is none."""
        if self._taken >= self._most:
            raise RequestError(_TOO_MANY_STREAMS)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


async def _close_too_much(connections: Connections, refusals: Refusals) -> None:
    while True:
        await asyncio.sleep(CLOSE_SECONDS)
        try:
            closed = await asyncio.to_thread(_look, connections)
        # Whatever it was, it is looked at again: a RuntimeError says that no thread can be started.
        except (OSError, RuntimeError, MemoryError) as error:
            log.warning("callers' connections were not looked at this time", reason=str(error))
        else:
            for (why, uid), times in closed.items():
                refusals.count(why, uid, times)


def _look(connections: Connections) -> Counter[tuple[Refused, int | None]]:
    if short_of_memory := lean.resident_memory() > MAX_MEMORY:
        # Of what is free, and was not returned yet, nobody is the cause.
        lean.give_back_freed_memory()
        short_of_memory = lean.resident_memory() > MAX_MEMORY
    return connections.close_too_much(short_of_memory=short_of_memory)


def _warn_if_blind(callers: Callers) -> None:
    """Make a connection to the daemon itself, and see that the table knows it."""
    try:
        connection = socket.create_connection(("127.0.0.1", callers.port))
    except OSError:  # a host without IPv4
        return
    with connection:
        host, port = connection.getsockname()
        # The server's socket may be born an instant after connect() returns.
        for _ in range(20):
            if callers.knows(host, port):
                return
            time.sleep(0.05)
    log.warning(
        "callers on loopback TCP cannot be told, so all are refused: connections to the daemon "
        "are not recorded; start it within the captured cgroup, or set api.tcp = false"
    )


async def _log_refusals(refusals: Refusals) -> None:
    while True:
        await asyncio.sleep(REFUSALS_LOG_SECONDS)
        refusals.write_log()


class Gate:
    """How calls come to a server."""

    def __init__(
        self,
        admit: Admit,
        streams: Places,
        *,
        counts_early: bool,
        heard: Callable[[str], None] | None = None,
    ) -> None:
        """Let calls in.

        Args:
            admit: whom.
            streams: how many.
            counts_early: whether a call is seen before its message has come. gRPC is told then
                that the call takes a stream of messages, which on the wire is the same.
            heard: is told from whom a message of a stream has come, as gRPC names the peer.
        """
        self.admit = admit
        self.streams = streams
        self.heard = heard
        self._counts_early = counts_early
        self._waiting: dict[asyncio.Task[Any], float] = {}
        """Calls whose message has not come, and until when it may; the oldest first."""
        self._is_watched = False

    @property
    def is_crowded(self) -> bool:
        """Whether so many calls wait for their message that any more are to be counted at once."""
        return len(self._waiting) >= MAX_CALLS_UNSEEN

    def unary(self, handle: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Carry calls of one message and one answer."""
        if self._counts_early:
            return grpc.stream_unary_rpc_method_handler(handle)
        return grpc.unary_unary_rpc_method_handler(handle)

    def server_stream(self, handle: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Carry calls of one message and many answers."""
        if self._counts_early:
            return grpc.stream_stream_rpc_method_handler(handle)
        return grpc.unary_stream_rpc_method_handler(handle)

    async def received(
        self,
        data: bytes | AsyncIterator[bytes],
        context: Context,
        request_type: type[_Request],
    ) -> _Request:
        """Decode the one message of a call, having waited for it where gRPC has not.

        Raises:
            TimeoutError: it did not come.
            DecodeError: it is none.
        """
        if isinstance(data, bytes):
            return request_type.FromString(data)
        # One timer for all calls: asyncio.timeout() would cost each a hundredth of its time.
        task = asyncio.current_task()
        assert task
        self._waiting[task] = time.monotonic() + REQUEST_SECONDS
        if not self._is_watched:
            self._give_up_on(asyncio.get_running_loop())
        try:
            # Not through the iterator: one that is not read to its end costs another task.
            message = await context.read()
        except asyncio.CancelledError:
            if task in self._waiting:
                raise
            task.uncancel()
            raise TimeoutError from None
        finally:
            self._waiting.pop(task, None)
        if not isinstance(message, bytes):
            raise DecodeError("the call has no message")
        return request_type.FromString(message)

    def _give_up_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the waiting of those that have waited for too long, now and from now on."""
        now = time.monotonic()
        for task, until in tuple(self._waiting.items()):
            if until > now:
                break
            del self._waiting[task]
            task.cancel()
        first = next(iter(self._waiting.values()), None)
        self._is_watched = first is not None
        if first is not None:
            loop.call_later(first - now, self._give_up_on, loop)


def handlers(view: View, hub: Hub, gate: Gate) -> list[grpc.GenericRpcHandler]:
    """Return all of the API, for a `grpc.aio` server.

    Messages are decoded here and not by gRPC, which would answer garbage with
    UNKNOWN and a traceback in the log.
    """
    health = HealthService(view.problems)
    reflector = reflection.aio.ReflectionServicer(
        (_PEER_CREDENTIALS, _HEALTH, reflection.SERVICE_NAME)
    )

    turn = asyncio.Lock()

    async def lookups(
        service: Service, requests: AsyncIterator[pb.LookupStreamRequest]
    ) -> AsyncIterator[pb.LookupStreamResponse]:
        async for request in requests:
            yield service.lookup_stream(request)

    def batch(
        service: Service, request: pb.BatchLookupRequest
    ) -> AsyncIterator[pb.BatchLookupResponse]:
        return _in_turns(service.batch_lookup(request), turn)

    async def connections(
        service: Service, request: pb.ListConnectionsRequest
    ) -> AsyncIterator[pb.ListConnectionsResponse]:
        async for page in _in_turns(service.list_connections(request), turn):
            if page.connections:
                yield page

    def watch(
        service: Service, request: pb.WatchConnectionsRequest
    ) -> AsyncIterator[pb.WatchConnectionsResponse]:
        return hub.watch(service.shown(request), sees_all=service.sees_all)

    api = {
        _PEER_CREDENTIALS: {
            "Lookup": _unary(gate, Service.lookup, pb.LookupRequest),
            "BatchLookup": _merged(gate, batch, pb.BatchLookupRequest),
            "LookupStream": _stream(gate, lookups, pb.LookupStreamRequest),
            "ListConnections": _server_stream(
                gate, connections, pb.ListConnectionsRequest, lists=True
            ),
            "WatchConnections": _server_stream(gate, watch, pb.WatchConnectionsRequest, lists=True),
            "GetStatus": _unary(gate, Service.get_status, pb.GetStatusRequest),
            "WhoAmI": _unary(gate, Service.who_am_i, pb.WhoAmIRequest),
        },
        _HEALTH: {
            "Check": _unary(
                gate, lambda _, request: health.check(request), health_pb2.HealthCheckRequest
            ),
            "List": _unary(
                gate, lambda _, request: health.list(request), health_pb2.HealthListRequest
            ),
            "Watch": _server_stream(
                gate, lambda _, request: health.watch(request), health_pb2.HealthCheckRequest
            ),
        },
        reflection.SERVICE_NAME: {
            "ServerReflectionInfo": _stream(
                gate,
                lambda _, requests: reflector.ServerReflectionInfo(requests, unused_context=None),
                reflection_pb2.ServerReflectionRequest,
            ),
        },
    }
    return [grpc.method_handlers_generic_handler(name, methods) for name, methods in api.items()]


def _unary(
    gate: Gate,
    method: Callable[[Service, _Request], _Response],
    request_type: type[_Request],
) -> grpc.RpcMethodHandler[bytes, bytes]:
    name = _name(request_type)

    def answer(service: Service, request: _Request) -> bytes:
        with service.figures.timing(name):
            return method(service, request).SerializeToString()

    async def handle(data: bytes | AsyncIterator[bytes], context: Context) -> bytes:
        try:
            if gate.is_crowded:
                service = gate.admit(context, False)
                return answer(service, await gate.received(data, context, request_type))
            request = await gate.received(data, context, request_type)
            return answer(gate.admit(context, False), request)
        except Exception as error:
            await _abort(context, error)

    return gate.unary(handle)


def _name(request_type: type[Message]) -> str:
    """What a call is called in figures: Lookup, HealthCheck."""
    return request_type.DESCRIPTOR.name.removesuffix("Request")


async def _in_turns(pages: Iterator[_Response], turn: asyncio.Lock) -> AsyncIterator[_Response]:
    """Make one page of all that share `turn`, then let everybody else have the event loop."""
    while True:
        async with turn:
            page = next(pages, None)
            await asyncio.sleep(0)
        if page is None:
            return
        yield page


def _merged(
    gate: Gate,
    method: Callable[[Service, _Request], AsyncIterator[_Response]],
    request_type: type[_Request],
) -> grpc.RpcMethodHandler[bytes, bytes]:
    name = _name(request_type)

    async def handle(data: bytes | AsyncIterator[bytes], context: Context) -> bytes:
        try:
            service = gate.admit(context, False)
            pages = method(service, await gate.received(data, context, request_type))
            with service.figures.timing(name):
                # By protobuf's encoding, messages one after the other are one merged message.
                return b"".join([page.SerializeToString() async for page in pages])
        except Exception as error:
            await _abort(context, error)

    return gate.unary(handle)


def _server_stream(
    gate: Gate,
    method: Callable[[Service, _Request], AsyncIterator[_Response]],
    request_type: type[_Request],
    *,
    lists: bool = False,
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(data: bytes | AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            with gate.streams.one():
                service = gate.admit(context, lists)
                request = await gate.received(data, context, request_type)
                async for response in method(service, request):
                    yield response.SerializeToString()
        except Exception as error:
            await _abort(context, error)

    return gate.server_stream(handle)


def _stream(
    gate: Gate,
    method: Callable[[Service, AsyncIterator[_Request]], AsyncIterator[_Response]],
    request_type: type[_Request],
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def decoded(messages: AsyncIterator[bytes], peer: str) -> AsyncIterator[_Request]:
        async for data in messages:
            if gate.heard:
                gate.heard(peer)
            yield request_type.FromString(data)

    async def handle(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            with gate.streams.one():
                service = gate.admit(context, False)
                async for response in method(service, decoded(messages, context.peer())):
                    yield response.SerializeToString()
        except Exception as error:
            await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


async def _abort(context: Context, error: Exception) -> NoReturn:
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, DecodeError):
        status = _MALFORMED
    elif isinstance(error, TimeoutError):
        status = _TOO_SLOW
    else:
        log.error("call failed", exc_info=error)
        status = _INTERNAL
    try:
        await context.abort(
            _CODES[status.code],
            status.message,
            (("grpc-status-details-bin", status.SerializeToString()),),
        )
    except grpc.aio.InternalError:
        # The call was closed at this instant. Left alone, gRPC would log a traceback as an error.
        raise asyncio.CancelledError from None
