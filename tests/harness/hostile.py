"""What an actor does that wants a daemon for itself, or its memory: floods, over either transport.

Each returns when the daemon has been sent all of it. What is left open stays so until `let_go`.
"""

from __future__ import annotations

import random
import select
import socket
from collections import Counter
from contextlib import suppress
from typing import Any

from harness import caller, raw_http2
from harness.patience import patient
from harness.raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    Address,
    frame,
)

_RANDOM = random.Random(0).randbytes(1 << 16)
_HEADERS_WITHOUT_END = frame(HEADERS, 0, 1, raw_http2.field("a", "b" * 100))
_AND_MORE = frame(CONTINUATION, 0, 1, raw_http2.field("a", "b" * 100) * 100)
_REMEMBERED_FIELD = frame(HEADERS, 0, 1, b"\x40\1a\0")
_FIELDS_OF_A_FRAME = 4096
_THE_SAME_AGAIN = frame(CONTINUATION, 0, 1, b"\xbe" * _FIELDS_OF_A_FRAME)
"""One byte for each field: of the table of those that were remembered (RFC 7541, 6.1 and 6.2.1)."""
GARBAGE = {
    "random frames": b"".join(
        frame(_RANDOM[i], _RANDOM[i + 1], i % 7, _RANDOM[i : i + 100]) for i in range(0, 8000, 4)
    ),
    "a frame too long": frame(DATA, 0, 1, bytes(1 << 20)),
    "pings": frame(PING, 0, 0, bytes(8)) * 5000,
    "settings": frame(SETTINGS, 0, 0, b"\0\4\0\0\xff\xff") * 5000,
    "headers without end": _HEADERS_WITHOUT_END + _AND_MORE * 200,
    "headers too long": frame(HEADERS, END_HEADERS, 1, raw_http2.field("a", "b" * 100) * 150),
    "a message of 4 GiB": raw_http2.call(1, "Lookup")
    + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff" + bytes(16_000)),
    "a message that is compressed, it says": raw_http2.call(1, "Lookup")
    + frame(DATA, END_STREAM, 1, b"\1\0\0\0\4" + bytes(4)),
    "a path of garbage": raw_http2.call(1, "\x00\xff\n"),
    "data of no stream": frame(DATA, 0, 99, bytes(100)) * 1000,
}

_API = "/peercred.v1.PeerCredentials"
_STOPPED_READING_SECONDS = patient(2)

_open: list[Any] = []


def let_go() -> None:
    """Close what the floods have left open."""
    for each in _open:
        each.close()
    _open.clear()


def be_idle(address: Address, count: int, greeting: bytes) -> None:
    """Make connections that say no more than that."""
    for _ in range(count):
        with suppress(ConnectionError):
            _open.append(raw_http2.dial(address, greeting))


def ask_and_read_nothing(target: str, method: str, connections: int, calls: int) -> dict[str, int]:
    """Make so many calls over each of so many connections; read of each what comes first.

    Args:
        target: the daemon, as gRPC has it.
        method: with an empty request, and many answers.
        connections: how many.
        calls: how many for each of these.

    Returns:
        How often a call was answered ("OK"), or refused, by the name of the code.
    """
    import grpc

    begun = []
    for _ in range(connections):
        _open.append(caller.own_channel(target))
        ask = _open[-1].unary_stream(f"{_API}/{method}")
        begun += [ask(b"") for _ in range(calls)]
    codes: Counter[str] = Counter()
    for call in begun:
        try:
            next(call)
        except grpc.RpcError as error:
            failed: Any = error
            codes[failed.code().name] += 1
        else:
            codes["OK"] += 1
    return dict(codes)


def open_streams(
    address: Address, connections: int, streams: int, size: int, refused: int, seconds: float
) -> None:
    """Open so many streams over each of so many connections.

    On one of each comes a part of a message of `size` bytes, which is never finished. Returns when
    so many of them have been refused.
    """
    socks = [raw_http2.dial(address) for _ in range(connections)]
    _open.extend(socks)
    for sock in socks:
        for number in range(streams):
            sock.sendall(raw_http2.call(1 + 2 * number, "LookupStream"))
    part = frame(DATA, 0, 1, b"\0" + size.to_bytes(4, "big") + bytes(8000))
    for sock in socks:
        sock.sendall(part)
    raw_http2.wait_until_ended(socks, refused, seconds)


def cancel_streams(target: str, method: str, count: int) -> None:
    """Begin calls of many answers and cancel them, every other one after its first answer."""
    import grpc

    with caller.own_channel(target) as own:
        ask = own.unary_stream(f"{_API}/{method}")
        for number in range(count):
            call = ask(b"")
            if number % 2:
                with suppress(grpc.RpcError):
                    next(call)
            call.cancel()


def reset_streams(address: Address, count: int) -> None:
    """Open streams over one connection and reset each at once."""
    with raw_http2.dial(address) as sock, suppress(ConnectionError):
        for stream in range(1, 2 * count, 2):
            reset = frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
            sock.sendall(raw_http2.call(stream, "ListConnections") + reset)
            _drain(sock)


def half_close(address: Address, count: int) -> None:
    """Make connections of which one direction is shut down, some in the middle of a call."""
    for number in range(count):
        with suppress(OSError):
            sock = raw_http2.dial(address)
            _open.append(sock)
            sock.sendall(raw_http2.call(1, "Lookup") if number % 2 else b"")
            sock.shutdown(socket.SHUT_WR if number % 3 else socket.SHUT_RD)


def send_garbage(address: Address, name: str, connections: int) -> int:
    """Send one of GARBAGE over so many connections, for as long as the daemon reads it.

    Returns how many bytes it was over all of them.
    """
    sent = 0
    for _ in range(connections):
        sock = raw_http2.dial(address)
        _open.append(sock)
        sock.setblocking(False)
        left = memoryview(GARBAGE[name])
        with suppress(ConnectionError):
            while left and select.select([], [sock], [], _STOPPED_READING_SECONDS)[1]:
                length = sock.send(left)
                sent, left = sent + length, left[length:]
                _drain(sock)
    return sent


def send_headers_until_closed(address: Address, connections: int, fields: int) -> None:
    """Send headers of so many fields over each connection, and no end, until all are closed."""
    changes = select.poll()
    socks, left = {}, {}
    for _ in range(connections):
        sock = raw_http2.dial(address, raw_http2.GREETING + _REMEMBERED_FIELD)
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        left[sock.fileno()] = _THE_SAME_AGAIN * (fields // _FIELDS_OF_A_FRAME)
        changes.register(sock, select.POLLOUT | select.POLLRDHUP)
    while socks:
        for descriptor, change in changes.poll():
            if change == select.POLLOUT:
                with suppress(ConnectionError):
                    left[descriptor] = left[descriptor][socks[descriptor].send(left[descriptor]) :]
                if not left[descriptor]:
                    changes.modify(descriptor, select.POLLRDHUP)
            else:
                changes.unregister(descriptor)
                socks.pop(descriptor).close()


def begin(address: Address, methods: list[str], count: int) -> None:
    """Begin so many calls of each of these methods, with a part of a message each."""
    for method in methods:
        for _ in range(count):
            sock = raw_http2.dial(address)
            sock.sendall(raw_http2.call(1, method) + frame(DATA, 0, 1, b"\0\0\0\1\0"))
            _open.append(sock)


def _drain(sock: socket.socket) -> None:
    """Read what has come, so that nothing waits for it."""
    while select.select([sock], [], [], 0)[0] and sock.recv(65_536):
        pass
