"""What an actor does that asks the daemon: gRPC by hand, and the client library.

An actor runs without the project. One that is to ask imports it while it is still root; those
forked from it have it then, and may become somebody who could not read it.
"""

from __future__ import annotations

import itertools
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

from harness import raw_http2, steps

_CALLS_PER_CONNECTION = 16
"""The daemon takes 32, and has more wait."""

_GOAWAY = 7

_channels: dict[str, Any] = {}
_open_calls: list[Any] = []
_open_channels: list[Any] = []
_silent: list[socket.socket] = []
_watching: list[Any] = []
_clients: dict[str | None, Any] = {}


class Reply(NamedTuple):
    """What came of a call."""

    code: str
    text: str
    details: bytes
    """Trailing metadata ``grpc-status-details-bin``."""
    messages: list[bytes]


def prepare(path: list[str]) -> None:
    """Import what asking takes, from folders that others may not read."""
    sys.path += path

    import psutil  # noqa: F401

    # gRPC imports these where it first needs them.
    from grpc import _channel, _server  # noqa: F401

    import peercred  # noqa: F401


def call(
    address: str, method: str, *requests: bytes, seconds: float = 60, anew: bool = False
) -> Reply:
    """Make one call, over the one connection to that address or over one of its own."""
    import grpc

    messages: list[bytes] = []
    with own_channel(address) if anew else nullcontext(_channel(address)) as channel:
        answers = channel.stream_stream(method)(iter(requests), timeout=seconds)
        try:
            messages += answers
        except grpc.RpcError as error:
            failed: Any = error
            details = dict(failed.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            return Reply(failed.code().name, failed.details(), details, messages)
        return Reply("OK", "", b"", messages)


def reset_connection(port: int) -> int:
    """Reset the one connection to that port; returns the port that it came from."""
    connection = _connection(port)
    steps.disconnect(connection.fd)
    return int(connection.laddr.port)


def port_of_connection(port: int) -> int:
    """The port that the one connection to that port comes from."""
    return int(_connection(port).laddr.port)


def open_calls(address: str, method: str, count: int, *requests: bytes) -> list[str]:
    """Begin calls that send no more than that, and wait for the first message of each.

    Returns how each went: the name of the code that it failed with, else OK.
    """
    import grpc

    codes: list[str] = []
    for index in range(count):
        if index % _CALLS_PER_CONNECTION == 0:
            _open_channels.append(own_channel(address))
        endless = itertools.chain(requests, _nothing())
        answers = _open_channels[-1].stream_stream(method)(endless)
        try:
            next(answers)
        except grpc.RpcError as error:
            codes.append(error.code().name)
        else:
            codes.append("OK")
            _open_calls.append(answers)
    return codes


def call_and_take_no_answer(
    address: tuple[str, int], method: str, connections: int, calls: int, refused: int
) -> None:
    """Make so many calls over each of so many connections, on which no message can be sent back.

    Returns when as many as `refused` have got an error, which needs no message.
    """
    for _ in range(connections):
        sock = raw_http2.dial(address, raw_http2.TAKES_NO_MESSAGE)
        _silent.append(sock)
        for stream in range(1, 2 * calls, 2):
            message = raw_http2.frame(
                raw_http2.DATA, raw_http2.END_STREAM, stream, raw_http2.EMPTY_MESSAGE
            )
            sock.sendall(raw_http2.call(stream, method) + message)
    raw_http2.wait_until_ended(_silent, refused, 60)


def cancel_calls() -> None:
    """Cancel what `open_calls` has begun."""
    for answers in _open_calls:
        answers.cancel()
    _open_calls.clear()


def ask(address: str | None, method: str, *arguments: Any, **named: Any) -> Any:
    """Call a method of the client library; returns what it returns, or the error as a pair."""
    import peercred

    try:
        if address not in _clients:
            _clients[address] = peercred.Client(address, timeout=60)
        answer = getattr(_clients[address], method)(*arguments, **named)
        return list(answer) if method == "connections" else answer
    except peercred.PeerCredError as error:
        return type(error).__name__, str(error)


def begin_watching(address: str) -> list[int]:
    """Watch with the client library; returns the server sockets' cookies of what is present."""
    import peercred

    client = _clients[address] = peercred.Client(address, timeout=60)
    _watching.append(client.watch())
    present = []
    for event in _watching[-1]:
        if event.kind is peercred.EventKind.SYNCHRONIZED:
            break
        present.append(event.connection.server_socket_cookie)
    return present


def next_watched() -> tuple[str, int]:
    """The next event of that: its kind, and the server socket's cookie."""
    event = next(_watching[-1])
    return event.kind.value, event.connection.server_socket_cookie


def address_of_client() -> str:
    """Where the client without an address asks."""
    return str(_clients[None].address)


def begin_calls(address: str, method: str, count: int) -> None:
    """Begin calls that never send their message."""
    for index in range(count):
        if index % _CALLS_PER_CONNECTION == 0:
            _open_channels.append(own_channel(address))
        _open_calls.append(_open_channels[-1].stream_stream(method)(_nothing()))


def connect_often(port: int, count: int) -> None:
    """Make connections that say they are gRPC's, and nothing after."""
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(raw_http2.GREETING)
        _open_calls.append(sock)


def wait_until_closed(left: int) -> int:
    """Wait until no more than so many of these connections are open.

    Returns:
        How many were closed without a word. One that has been idle for too long gets a GOAWAY.
    """
    still = select.poll()
    for sock in _open_calls:
        still.register(sock, select.POLLRDHUP)
    closed: set[int] = set()
    while len(_open_calls) - len(closed) > left:
        for descriptor, _ in still.poll():
            closed.add(descriptor)
            still.unregister(descriptor)
    return sum(_GOAWAY not in _frame_types(sock) for sock in _open_calls if sock.fileno() in closed)


def _frame_types(sock: socket.socket) -> Iterator[int]:
    """Of all that came over a connection which is closed (RFC 9113, section 4.1)."""
    data = b""
    with suppress(ConnectionResetError):
        while received := sock.recv(1 << 16):
            data += received
    while len(data) >= 9:
        yield data[3]
        data = data[9 + int.from_bytes(data[:3], "big") :]


def serve_as_the_daemon(address: str) -> int:
    """Answer there whatever is asked; returns the port."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def refuse(_: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.NOT_FOUND, "a lie")
        return b""

    class Everything(grpc.GenericRpcHandler):
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Everything()])
    port = int(server.add_insecure_port(address))
    server.start()
    _open_calls.append(server)
    return port


def own_channel(address: str) -> Any:
    """A new connection: channels to one address share one unless told otherwise."""
    import grpc

    return grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def _connection(port: int) -> Any:
    import psutil

    (connection,) = (
        each
        for each in psutil.Process().net_connections("tcp")
        if each.raddr and each.raddr.port == port
    )
    return connection


def _channel(address: str) -> Any:
    import grpc

    if address not in _channels:
        _channels[address] = grpc.insecure_channel(address)
    return _channels[address]


def _nothing() -> Any:
    """Sends nothing, and does not end."""
    import threading

    threading.Event().wait()
    yield b""
