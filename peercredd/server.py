"""The gRPC server: carries `service`, `health` and reflection over a unix socket.

It is asyncio and not a pool of threads: there every open stream holds a thread,
so a handful of idle clients keeps all others waiting.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.defaults import STOP_GRACE_SECONDS
from peercredd.health import HealthService
from peercredd.listen import UnixSocket
from peercredd.service import PeerCredentialsService, RequestError, View
from peercredd.watching import Hub

MAX_CONCURRENT_CALLS: Final = 1024
"""Beyond it calls fail with RESOURCE_EXHAUSTED."""

OPTIONS: Final = (
    # 1,000 keys with the longest addresses take some 150 KB.
    ("grpc.max_receive_message_length", 256 * 1024),
    ("grpc.max_concurrent_streams", 128),
    # Of the 1,024 descriptors that a process may have by default, leave some.
    ("grpc.max_allowed_incoming_connections", 768),
    ("grpc.max_connection_idle_ms", 10 * 60 * 1000),
)

_PEER_CREDENTIALS = pb.DESCRIPTOR.services_by_name["PeerCredentials"].full_name
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_MALFORMED = Status(code=code_pb2.INVALID_ARGUMENT, message="the message cannot be decoded")
_INTERNAL = Status(code=code_pb2.INTERNAL, message="internal error, see the daemon's log")
_CODES = {code.value[0]: code for code in grpc.StatusCode}

log = structlog.get_logger()

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


@asynccontextmanager
async def serving(view: View, hub: Hub, path: Path, group: str) -> AsyncIterator[None]:
    """Serve on the unix socket `path` for as long as the ``async with`` block runs.

    The block begins when clients can connect, so say there that the daemon is
    ready, and wait for what ends it. On leaving, calls under way get
    STOP_GRACE_SECONDS.

    A second listener with other rights is a second `grpc.aio` server in the same
    loop, with `handlers()` of a service that has another view.

    Raises `listen.ListenError`.
    """
    with UnixSocket(path, group) as unix_socket:
        server = grpc.aio.server(
            handlers=handlers(PeerCredentialsService(view), hub),
            options=OPTIONS,
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        server.add_insecure_port(f"unix:{unix_socket.private_path}")
        await server.start()
        try:
            unix_socket.publish()
            yield
        finally:
            await server.stop(STOP_GRACE_SECONDS)


def handlers(service: PeerCredentialsService, hub: Hub) -> list[grpc.GenericRpcHandler]:
    """Return all of the API, for a `grpc.aio` server.

    Messages are decoded here and not by gRPC, which would answer garbage with
    UNKNOWN and a traceback in the log.
    """
    health = HealthService(service.capture_in_place)
    reflector = reflection.aio.ReflectionServicer(
        (_PEER_CREDENTIALS, _HEALTH, reflection.SERVICE_NAME)
    )

    turn = asyncio.Lock()

    async def lookups(
        requests: AsyncIterator[pb.LookupStreamRequest],
    ) -> AsyncIterator[pb.LookupStreamResponse]:
        async for request in requests:
            yield service.lookup_stream(request)

    def batch(request: pb.BatchLookupRequest) -> AsyncIterator[pb.BatchLookupResponse]:
        return _in_turns(service.batch_lookup(request), turn)

    async def connections(
        request: pb.ListConnectionsRequest,
    ) -> AsyncIterator[pb.ListConnectionsResponse]:
        async for page in _in_turns(service.list_connections(request), turn):
            if page.connections:
                yield page

    def watch(request: pb.WatchConnectionsRequest) -> AsyncIterator[pb.WatchConnectionsResponse]:
        return hub.watch(service.filter(request))

    api = {
        _PEER_CREDENTIALS: {
            "Lookup": _unary(service.lookup, pb.LookupRequest),
            "BatchLookup": _merged(batch, pb.BatchLookupRequest),
            "LookupStream": _stream(lookups, pb.LookupStreamRequest),
            "ListConnections": _server_stream(connections, pb.ListConnectionsRequest),
            "WatchConnections": _server_stream(watch, pb.WatchConnectionsRequest),
            "GetStatus": _unary(service.get_status, pb.GetStatusRequest),
        },
        _HEALTH: {
            "Check": _unary(health.check, health_pb2.HealthCheckRequest),
            "List": _unary(health.list, health_pb2.HealthListRequest),
            "Watch": _server_stream(health.watch, health_pb2.HealthCheckRequest),
        },
        reflection.SERVICE_NAME: {
            "ServerReflectionInfo": _stream(
                functools.partial(reflector.ServerReflectionInfo, unused_context=None),
                reflection_pb2.ServerReflectionRequest,
            ),
        },
    }
    return [grpc.method_handlers_generic_handler(name, methods) for name, methods in api.items()]


def _unary(
    method: Callable[[_Request], _Response], request_type: type[_Request]
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(data: bytes, context: _Context) -> bytes:
        try:
            return method(request_type.FromString(data)).SerializeToString()
        except Exception as error:
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handle)


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
    method: Callable[[_Request], AsyncIterator[_Response]], request_type: type[_Request]
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(data: bytes, context: _Context) -> bytes:
        try:
            pages = method(request_type.FromString(data))
            # By protobuf's encoding, messages one after the other are one merged message.
            return b"".join([page.SerializeToString() async for page in pages])
        except Exception as error:
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handle)


def _server_stream(
    method: Callable[[_Request], AsyncIterator[_Response]], request_type: type[_Request]
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(data: bytes, context: _Context) -> AsyncIterator[bytes]:
        try:
            async for response in method(request_type.FromString(data)):
                yield response.SerializeToString()
        except Exception as error:
            await _abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handle)


def _stream(
    method: Callable[[AsyncIterator[_Request]], AsyncIterator[_Response]],
    request_type: type[_Request],
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def decoded(messages: AsyncIterator[bytes]) -> AsyncIterator[_Request]:
        async for data in messages:
            yield request_type.FromString(data)

    async def handle(messages: AsyncIterator[bytes], context: _Context) -> AsyncIterator[bytes]:
        try:
            async for response in method(decoded(messages)):
                yield response.SerializeToString()
        except Exception as error:
            await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


async def _abort(context: _Context, error: Exception) -> NoReturn:
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, DecodeError):
        status = _MALFORMED
    else:
        log.error("call failed", exc_info=error)
        status = _INTERNAL
    await context.abort(
        _CODES[status.code],
        status.message,
        (("grpc-status-details-bin", status.SerializeToString()),),
    )
