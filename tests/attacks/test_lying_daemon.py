"""A daemon that is none, or that somebody has broken into: what the library makes of its answers.

What can be said in a message is in tests/fuzz; here is what gRPC carries beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status

from peercred import Client, PeerCredError

DETAILS = "grpc-status-details-bin"


@contextmanager
def daemon(path: Path, answer: Callable[[grpc.ServicerContext], bytes]) -> Iterator[Client]:
    """A client of a server whose every Lookup is `answer`, in bytes."""

    def lookup(_: bytes, context: grpc.ServicerContext) -> bytes:
        return answer(context)

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(lookup)
    service = grpc.method_handlers_generic_handler(
        "peercred.v1.PeerCredentials", {"Lookup": handler}
    )
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((service,))
        server.add_insecure_port(f"unix:{path}")
        server.start()
        with Client(f"unix:{path}") as client:
            yield client
        server.stop(None).wait()


def abort(context: Any, code: grpc.StatusCode, text: str, details: bytes) -> bytes:
    context.set_trailing_metadata(((DETAILS, details),))
    context.abort(code, text)
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "details"),
    [
        ("no", b"\xff\xff\xff"),
        ("no", Status(code=code_pb2.OK, message="no").SerializeToString()),
        ("no", Status(code=code_pb2.NOT_FOUND, message="another text").SerializeToString()),
        ("no", Status(code=99, message="no").SerializeToString()),
        ("no\n<2>root logged in\x1b[31m", b""),
        ("x" * 3000, b""),
    ],
    ids=["garbage", "says OK", "two texts", "unknown code", "escapes", "long"],
)
@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS])
def test_a_failure_that_contradicts_itself_is_an_error_of_one_line(
    tmp_path: Path, code: grpc.StatusCode, text: str, details: bytes
) -> None:
    answer = functools.partial(abort, code=code, text=text, details=details)
    with (
        daemon(tmp_path / "s", answer) as client,
        pytest.raises(PeerCredError) as raised,
    ):
        client.lookup_cookie(1)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_an_answer_that_is_no_message_is_an_error(tmp_path: Path) -> None:
    with (
        daemon(tmp_path / "s", lambda _: b"\xff\xff\xff") as client,
        pytest.raises(PeerCredError) as raised,
    ):
        client.lookup_cookie(1)
    assert str(raised.value).isprintable()


def test_an_answer_of_a_hundred_megabytes_is_an_error(tmp_path: Path) -> None:
    with (
        daemon(tmp_path / "s", lambda _: bytes(100 << 20)) as client,
        pytest.raises(PeerCredError) as raised,
    ):
        client.lookup_cookie(1)
    assert str(raised.value).isprintable()
