"""Garbage in: never an exception that is not documented, never a uid that was not in it."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status as RpcStatus
from hypothesis import strategies as st

from harness import memory_view
from harness.fuzzing import LONGEST, fuzz
from harness.memory_view import MemoryView
from peercred import Credentials, Namespaces, PeerCredError, _wire
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import config, encode, records
from peercredd.config import ConfigError
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Answer

MAX_ERROR = 1000
"""Characters of an error's text: what a terminal shows at one glance."""
UNSET_ID = 2**32 - 1

M = TypeVar("M", bound=Message)

# Where struct credentials has its euid and egid: behind four u64 and six u32.
EUID = struct.Struct("=56xII")
TGID = struct.Struct("=32xI")
KNOWN = struct.Struct("=92xI")


def one_line(text: str) -> None:
    assert text
    assert text.isprintable(), ascii(text)
    assert len(text) <= MAX_ERROR, len(text)


class NoMessage(Exception):  # noqa: N818 - no error: gRPC refuses it before anybody looks
    """Bytes that are no message of that kind."""


def parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise NoMessage from None


# records


def whole(data: bytes) -> bytes:
    """As long as the kernel makes it, and written to its end."""
    record = bytearray(data[: records.CONNECTION_SIZE].ljust(records.CONNECTION_SIZE, b"\xa5"))
    if not any(record[:8]):
        record[0] = 1
    return bytes(record)


def decode_record(data: bytes) -> None:
    record = whole(data)
    found = records.connection(record)
    assert found is not None
    records.ends(record)
    records.absence_reason(record[:8], int.from_bytes(record[8:16]))
    message = pb.Connection()
    encode.connection(message, found)
    told = _wire.connection(pb.Connection.FromString(message.SerializeToString()))
    check_credentials(told.client, record, records.CLIENT_OFFSET)
    if told.listener:
        check_credentials(told.listener, record, records.LISTENER_OFFSET)
    if told.acceptor:
        check_credentials(told.acceptor, record, records.ACCEPTOR_OFFSET)
    for peer in (found.client, found.listener):
        if peer is not None:
            answer = Answer(
                peer,
                asker_is_server=True,
                tuple=found.tuple,
                server_socket_cookie=found.server_socket_cookie,
                client_socket_cookie=found.client_socket_cookie,
                established_time_ns=found.established_time_ns,
                acceptor=found.acceptor,
            )
            response = pb.LookupResponse()
            encode.answer(response, answer, pb.BASIS_SOCKET)
            assert _wire.peer_credentials(response, None).uid == peer.euid


def check_credentials(told: object, record: bytes, offset: int) -> None:
    (pid,) = TGID.unpack_from(record, offset)
    assert isinstance(told, Credentials)
    assert (told.pid, told.uid, told.gid) == (pid, *EUID.unpack_from(record, offset))
    assert told.comm is not None or KNOWN.unpack_from(record, offset)[0] & records.WITHHELD
    assert len(told.groups) <= records.MAX_GROUPS


def test_every_record_is_decoded_and_no_uid_is_one_that_was_not_in_it() -> None:
    def decode(data: bytes) -> None:
        try:
            decode_record(data)
        except PeerCredError as error:
            refused = str(error)
        else:
            return
        # The only numbers that the library takes from nobody.
        one_line(refused)
        if "take it for unknown" in refused:
            assert b"\xff\xff\xff\xff" in whole(data)
        else:
            assert "no end of a connection" in refused
            assert b"\0\0" in whole(data)

    fuzz("records", decode, st.binary(max_size=records.CONNECTION_SIZE))


# configuration


@pytest.fixture
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peercredd-test-") as folder:
        yield Path(folder) / "f.toml"


def toml() -> st.SearchStrategy[bytes]:
    """Of the right shape, with values that may be wrong."""
    values = st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.booleans().map(lambda value: str(value).lower()),
        st.text().map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'),
        st.sampled_from(["[]", "{}", '["all"]', "[1]", "1979-05-27", '"""', "'", "[[", "0x", "é"]),
    )
    names = st.sampled_from([*config.OPTIONS, *config.TABLES]) | st.text(max_size=8)
    lines = st.tuples(names, values).map(lambda pair: f"{pair[0]} = {pair[1]}")
    heads = st.sampled_from(config.TABLES).map(lambda table: f"[{table}]")
    text = st.lists(lines | heads, max_size=6).map("\n".join)
    return text.map(lambda text: text.encode("utf-8", "surrogatepass"))


def test_a_configuration_is_read_or_refused_in_one_line_that_names_the_file(file: Path) -> None:
    def read(data: bytes) -> None:
        file.write_bytes(data)
        try:
            effective = config.load(file, {})
        except ConfigError as error:
            refused = str(error)
        else:
            # What is accepted can be told again, and is accepted once more.
            flags = {
                key: value if isinstance(value, bool | list) else str(value)
                for key, value, _ in effective.values()
            }
            assert config.load(file, flags).config == effective.config
            return
        one_line(refused)
        assert refused.startswith(f"{file}: ")

    fuzz("config", read, toml() | st.binary(max_size=LONGEST))


# requests


def messages() -> st.SearchStrategy[bytes]:
    """Bytes that some protobuf decoder makes something of."""
    varint = st.integers(0, 2**64 - 1).map(encoded_varint)
    fields = st.recursive(
        st.tuples(st.integers(1, 24), st.just(0), varint)
        | st.tuples(st.integers(1, 24), st.just(1), st.binary(min_size=8, max_size=8))
        | st.tuples(
            st.integers(1, 24),
            st.just(2),
            (
                st.binary(max_size=64)
                | st.text(max_size=16).map(str.encode)
                | st.sampled_from([b"127.0.0.1", b"::1", b"::ffff:127.0.0.1", b"fe80::1%\x1b["])
            ).map(with_length),
        ),
        lambda inner: st.tuples(
            st.integers(1, 24),
            st.just(2),
            st.lists(inner, max_size=6).map(lambda many: with_length(b"".join(map(field, many)))),
        ),
        max_leaves=24,
    )
    return st.lists(fields, max_size=10).map(lambda many: b"".join(map(field, many)))


def encoded_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def with_length(data: bytes) -> bytes:
    return encoded_varint(len(data)) + data


def field(parts: tuple[int, int, bytes]) -> bytes:
    number, kind, payload = parts
    return encoded_varint(number << 3 | kind) + payload


VIEW = MemoryView(memory_view.connection(10), memory_view.connection(11, client_uid=5000))
COOKIES = {10: 1000, 11: 5000, 1_000_010: 2000, 1_000_011: 2000}
"""The uid at the other end of each socket in the view."""


def test_every_request_is_answered_or_refused_in_one_line_and_named_by_what_it_asked() -> None:
    service = PeerCredentialsService(VIEW)

    def check(found: pb.LookupResponse, key: pb.ConnectionKey) -> None:
        assert found.peer.HasField("uid")
        if found.namespaces.user_namespace != 4026531837:
            return  # in the numbers of another namespace of this very host
        if key.HasField("socket_cookie"):
            assert found.peer.uid == COOKIES[key.socket_cookie]
        else:
            assert found.basis == pb.BASIS_TUPLE
            assert {key.local.port, key.remote.port} == {50000, 8080}

    def ask(data: bytes) -> None:
        for ask in (ask_one, ask_batch, ask_stream, ask_list, ask_to_watch):
            try:
                ask(data)
            except NoMessage:
                pass
            except RequestError as error:
                one_line(error.status.message)

    def ask_one(data: bytes) -> None:
        request = parsed(pb.LookupRequest, data)
        check(service.lookup(request), request.key)

    def ask_batch(data: bytes) -> None:
        request = parsed(pb.BatchLookupRequest, data)
        results = [result for page in service.batch_lookup(request) for result in page.results]
        for key, result in zip(request.keys, results, strict=True):
            check_result(result, key)

    def ask_stream(data: bytes) -> None:
        request = parsed(pb.LookupStreamRequest, data)
        check_result(service.lookup_stream(request).result, request.key)

    def ask_list(data: bytes) -> None:
        request = parsed(pb.ListConnectionsRequest, data)
        listed = [each for page in service.list_connections(request) for each in page.connections]
        if request.HasField("client_uid"):
            assert {each.client.uid for each in listed} <= {request.client_uid}

    def ask_to_watch(data: bytes) -> None:
        request = parsed(pb.WatchConnectionsRequest, data)
        shown = [each for each in map(service.shown(request), VIEW.connections.values()) if each]
        if request.HasField("client_uid"):
            assert {each.client.euid for each in shown} <= {request.client_uid}

    def check_result(result: pb.LookupResult, key: pb.ConnectionKey) -> None:
        if result.HasField("found"):
            check(result.found, key)
        else:
            assert result.HasField("error")
            one_line(result.error.message)

    fuzz("requests", ask, messages() | st.binary(max_size=256))


# what a lying daemon may send


def test_every_answer_is_understood_or_refused_in_one_line_and_never_has_an_id_of_its_own() -> None:
    asked = Namespaces(pid=1, user=2)
    question = (("127.0.0.1", 1), ("127.0.0.1", 2))

    def lookup(data: bytes) -> None:
        response = parsed(pb.LookupResponse, data)
        for namespaces in (None, asked):
            told = _wire.peer_credentials(response, namespaces)
            check(told, response.peer)
            if told.acceptor:
                check(told.acceptor, response.acceptor)

    def check(told: Credentials, sent: pb.Credentials) -> None:
        for name in ("pid", "uid", "gid"):
            assert sent.HasField(name)
            assert getattr(told, name) == getattr(sent, name)
        assert UNSET_ID not in (told.uid, told.gid)

    def batch(data: bytes) -> None:
        response = parsed(pb.BatchLookupResponse, data)
        questions = [question] * len(response.results)
        for answer in _wire.Batch(questions, None).answers(response):
            if isinstance(answer, PeerCredError):
                one_line(str(answer))

    def listed(data: bytes) -> None:
        sent = parsed(pb.Connection, data)
        told = _wire.connection(sent)
        check(told.client, sent.client)
        for end in (told.client_endpoint, told.server_endpoint):
            assert 0 < end.port < 65536
            one_line(str(end))

    def state(data: bytes) -> None:
        _wire.status(parsed(pb.GetStatusResponse, data))

    def failed(data: bytes) -> None:
        result = pb.LookupResult(error=parsed(RpcStatus, data))
        response = pb.BatchLookupResponse(results=[result])
        (answer,) = _wire.Batch([question], None).answers(response)
        assert isinstance(answer, PeerCredError)
        one_line(str(answer))

    def understand(data: bytes) -> None:
        for understand in (lookup, batch, listed, state, failed):
            try:
                understand(data)
            except NoMessage:
                pass
            except PeerCredError as error:
                one_line(str(error))

    fuzz("answers", understand, messages() | st.binary(max_size=256))
