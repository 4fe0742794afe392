"""HTTP/2 by hand, for callers that do not keep to it."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Address: TypeAlias = Path | tuple[str, int]
"""Of a unix socket, or of a port."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM = 1
END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113, 4.1)."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


GREETING = PREFACE + frame(SETTINGS, 0, 0)
TAKES_NO_MESSAGE = PREFACE + frame(SETTINGS, 0, 0, b"\0\4" + bytes(4))
"""A greeting with SETTINGS_INITIAL_WINDOW_SIZE 0: only headers may be sent to this client."""
EMPTY_MESSAGE = bytes(5)
"""As gRPC has it in a DATA frame."""


def field(name: str, value: str) -> bytes:
    """A header field, literal and not to be remembered (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def call(stream: int, method: str) -> bytes:
    """The beginning of a call; its message would follow."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/peercred.v1.PeerCredentials/{method}",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    fields = b"".join(field(*each) for each in headers.items())
    return frame(HEADERS, END_HEADERS, stream, fields)


def dial(address: Address, greeting: bytes = GREETING) -> socket.socket:
    """A connection that has sent its greeting."""
    if isinstance(address, Path):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(address))
    else:
        sock = socket.create_connection(address)
    sock.sendall(greeting)
    return sock


def wait_until_ended(socks: Iterable[socket.socket], count: int, seconds: float) -> None:
    """Read until the other side has ended so many streams of these connections.

    Raises:
        AssertionError: it did not within as many seconds of silence.
    """
    ended: set[tuple[socket.socket, bytes]] = set()
    received: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as readable:
        for sock in socks:
            readable.register(sock, selectors.EVENT_READ, sock)
        while len(ended) < count:
            ready = [key.data for key, _ in readable.select(seconds)]
            assert ready, f"{len(ended)} streams were ended, not {count}"
            for sock in ready:
                data = received.get(sock, b"") + sock.recv(1 << 16)
                assert data, "a connection was closed"
                while len(data) >= 9 and len(data) >= (end := 9 + int.from_bytes(data[:3], "big")):
                    if data[3] == RST_STREAM or (data[3] == HEADERS and data[4] & END_STREAM):
                        ended.add((sock, data[5:9]))
                    data = data[end:]
                received[sock] = data
