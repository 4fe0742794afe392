from __future__ import annotations

import asyncio
import dataclasses
import pickle
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status

import peercred
from harness.blocking_twin import BlockingTwin
from harness.canned_daemon import CannedDaemon, failure, found
from peercred import Basis, Client, End, InvalidArgument, NotFound, PeerCredError
from peercred.v1 import peer_credentials_pb2 as pb

SO_COOKIE = 57
SO_NETNS_COOKIE = 71
IPPROTO_MPTCP = 262
NEVER_SEEN = failure(code_pb2.NOT_FOUND, "no connect() was recorded", "NEVER_SEEN")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/peercredd.sock") as canned:
        yield canned


@pytest.fixture(params=[Client, BlockingTwin], ids=["Client", "AsyncClient"])
def client(
    request: pytest.FixtureRequest, canned: CannedDaemon, tmp_path: Path
) -> Iterator[Client | BlockingTwin]:
    with request.param(f"unix:{tmp_path}/peercredd.sock") as client:
        yield client


def connect(listen: str, destination: str, protocol: int = socket.IPPROTO_TCP) -> Iterator[Pair]:
    def family(address: str) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in address else socket.AF_INET

    with (
        socket.socket(family(listen), socket.SOCK_STREAM, protocol) as listener,
        socket.socket(family(destination), socket.SOCK_STREAM, protocol) as connecting,
    ):
        if family(listen) == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((listen, 0))
        listener.listen()
        connecting.connect((destination, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            yield accepted, connecting


@pytest.fixture(
    params=[
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
    ],
    ids=["v4", "v6", "v4-to-dual-stack", "v4-mapped"],
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from connect(*request.param)


@pytest.fixture
def v4_pair() -> Iterator[Pair]:
    yield from connect("127.0.0.1", "127.0.0.1")


@pytest.fixture
def mptcp_pair() -> Iterator[Pair]:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError as error:
        pytest.skip(f"no MPTCP: {error}")
    yield from connect("127.0.0.1", "127.0.0.1", IPPROTO_MPTCP)


def option(sock: socket.socket, name: int) -> int:
    (value,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, name, 8))
    assert isinstance(value, int)
    return value


def endpoint(address: tuple[str, int]) -> pb.Endpoint:
    return pb.Endpoint(address=address[0], port=address[1])


def reset(connecting: socket.socket, accepted: socket.socket) -> None:
    """Close `connecting` with a RST and wait until it has arrived."""
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connecting.close()
    poll = select.poll()
    poll.register(accepted, select.POLLHUP)
    assert poll.poll()


def test_both_ends_are_named_by_cookies_and_addresses(
    canned: CannedDaemon, client: Client, pair: Pair
) -> None:
    for sock in pair:
        client.lookup(sock)
        assert canned.keys.pop() == pb.ConnectionKey(
            socket_cookie=option(sock, SO_COOKIE),
            netns_cookie=option(sock, SO_NETNS_COOKIE),
            local=endpoint(sock.getsockname()),
            remote=endpoint(sock.getpeername()),
        )


def test_an_mptcp_socket_is_named_by_addresses_alone(
    canned: CannedDaemon, client: Client, mptcp_pair: Pair
) -> None:
    for sock in mptcp_pair:
        client.lookup(sock)
        assert canned.keys.pop() == pb.ConnectionKey(
            netns_cookie=option(sock, SO_NETNS_COOKIE),
            local=endpoint(sock.getsockname()),
            remote=endpoint(sock.getpeername()),
        )


def test_a_tcp_socket_that_an_mptcp_listener_accepted_is_named_by_its_cookie(
    canned: CannedDaemon, client: Client, mptcp_pair: Pair
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            client.lookup(accepted)
            assert canned.keys.pop().socket_cookie == option(accepted, SO_COOKIE)


def test_a_socket_that_the_client_reset_is_named_by_its_cookie(
    canned: CannedDaemon, client: Client, v4_pair: Pair
) -> None:
    accepted, connecting = v4_pair
    reset(connecting, accepted)

    client.lookup(accepted)

    assert canned.keys.pop() == pb.ConnectionKey(socket_cookie=option(accepted, SO_COOKIE))


@pytest.mark.parametrize("reason", ["RETIRED", "TABLE_WAS_FULL", "OLDER_THAN_CAPTURE"])
def test_a_reset_socket_keeps_the_reason_why_it_is_not_found(
    canned: CannedDaemon, client: Client, v4_pair: Pair, reason: str
) -> None:
    accepted, connecting = v4_pair
    reset(connecting, accepted)
    canned.answer = failure(code_pb2.NOT_FOUND, "gone", reason)

    with pytest.raises(NotFound, match="gone") as caught:
        client.lookup(accepted)

    assert caught.value.reason == reason


def test_a_connected_socket_that_was_never_seen_is_not_found(
    canned: CannedDaemon, client: Client, v4_pair: Pair
) -> None:
    canned.answer = NEVER_SEEN

    with pytest.raises(NotFound) as caught:
        client.lookup(v4_pair[0])

    assert caught.value.reason == "NEVER_SEEN"


def test_a_socket_that_never_was_connected_is_an_invalid_argument(
    canned: CannedDaemon, client: Client
) -> None:
    canned.answer = NEVER_SEEN
    with socket.socket() as sock, pytest.raises(InvalidArgument, match="not connected") as caught:
        client.lookup(sock)

    assert caught.value.field == "sock"


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", 9))
    return sock


def unix() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


def netlink_of_protocol_6() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)


def unconnected_mptcp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (listening, "the socket listens"),
        (closed, "the socket is closed"),
        (udp, "no TCP socket.*SOCK_DGRAM"),
        (unix, "no TCP socket.*AF_UNIX"),
        (netlink_of_protocol_6, "no TCP socket.*AF_NETLINK"),
        (unconnected_mptcp, "not connected"),
    ],
)
def test_what_is_wrong_with_a_socket_is_said_without_asking_the_daemon(
    canned: CannedDaemon, client: Client, make: object, complaint: str
) -> None:
    assert callable(make)
    with make() as sock, pytest.raises(InvalidArgument, match=complaint) as caught:
        client.lookup(sock)

    assert caught.value.field == "sock"
    assert canned.keys == []


def test_an_asyncio_transports_socket_can_be_asked_about(canned: CannedDaemon) -> None:
    async def ask() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address)
        sock = writer.get_extra_info("socket")
        async with peercred.AsyncClient(canned.address) as client:
            await client.lookup(sock)
        assert canned.keys.pop().remote == endpoint(address)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    asyncio.run(ask())


def test_an_answer_arrives_whole(canned: CannedDaemon, client: Client) -> None:
    sent = pb.Credentials(
        groups=[4, 0, 27],
        groups_truncated=True,
        comm=b"n\xc3\xa4me\xff",
        no_new_privs=False,
    )
    numbers = [
        field
        for field in pb.Credentials.DESCRIPTOR.fields
        if field.has_presence and field.name not in ("comm", "no_new_privs")
    ]
    for field in numbers:
        setattr(sent, field.name, 100 + field.number)
    canned.answer = pb.LookupResponse(
        peer_end=pb.END_SERVER,
        basis=pb.BASIS_TUPLE,
        peer=sent,
        server_socket_cookie=1,
        client_socket_cookie=2,
        netns_cookie=2**64 - 1,
        established_time_ns=4,
        namespaces=pb.Namespaces(pid_namespace=5, user_namespace=6),
        acceptor=pb.Credentials(pid=21, uid=0, gid=22, groups=[5], comm=b"worker"),
    )

    assert client.lookup_cookie(5) == peercred.PeerCredentials(
        **{field.name: 100 + field.number for field in numbers},
        groups=(4, 0, 27),
        groups_truncated=True,
        comm="näme\\xff",
        no_new_privs=False,
        peer_end=End.SERVER,
        basis=Basis.TUPLE,
        server_socket_cookie=1,
        client_socket_cookie=2,
        netns_cookie=2**64 - 1,
        established_time_ns=4,
        namespaces=peercred.Namespaces(pid=5, user=6),
        acceptor=peercred.Credentials(pid=21, uid=0, gid=22, groups=(5,), comm="worker"),
    )


def test_a_field_of_the_protocol_has_the_same_name_in_python() -> None:
    assert {field.name for field in dataclasses.fields(peercred.Credentials)} == {
        field.name for field in pb.Credentials.DESCRIPTOR.fields
    }


def test_what_the_kernel_does_not_provide_is_none(canned: CannedDaemon, client: Client) -> None:
    canned.answer = found()

    peer = client.lookup_cookie(1)

    assert (peer.pid, peer.uid, peer.gid) == (7, 0, 0)
    assert peer.acceptor is None
    absent = {
        field.name
        for field in dataclasses.fields(peercred.Credentials)
        if getattr(peer, field.name) is None
    }
    assert absent == {
        field.name
        for field in pb.Credentials.DESCRIPTOR.fields
        if field.has_presence and field.name not in ("pid", "uid", "gid")
    }


@pytest.mark.parametrize("missing", ["pid", "uid", "gid"])
def test_an_answer_without_an_id_is_an_error_never_root(
    canned: CannedDaemon, client: Client, missing: str
) -> None:
    answer = found()
    answer.peer.ClearField(missing)  # type: ignore[arg-type]
    canned.answer = answer

    with pytest.raises(PeerCredError, match=f"no {missing}"):
        client.lookup_cookie(1)


def test_an_acceptor_never_lends_its_ids_to_an_answer_without(
    canned: CannedDaemon, client: Client
) -> None:
    canned.answer = pb.LookupResponse(
        peer_end=pb.END_CLIENT,
        basis=pb.BASIS_SOCKET,
        acceptor=pb.Credentials(pid=1, uid=2, gid=3),
    )

    with pytest.raises(PeerCredError, match="no pid"):
        client.lookup_cookie(1)


@pytest.mark.parametrize("field", ["peer_end", "basis"])
@pytest.mark.parametrize("value", [0, 3])
def test_an_answer_that_does_not_say_what_it_is_about_is_an_error(
    canned: CannedDaemon, client: Client, field: str, value: int
) -> None:
    answer = found()
    setattr(answer, field, value)
    canned.answer = answer

    with pytest.raises(PeerCredError, match="which end"):
        client.lookup_cookie(1)


def test_a_cookie_goes_out_as_given(canned: CannedDaemon, client: Client) -> None:
    client.lookup_cookie(2**64 - 1)
    client.lookup_cookie(5, 6)

    assert canned.keys == [
        pb.ConnectionKey(socket_cookie=2**64 - 1),
        pb.ConnectionKey(socket_cookie=5, netns_cookie=6),
    ]


def test_a_tuple_is_taken_as_getsockname_gives_it_or_as_endpoints(
    canned: CannedDaemon, client: Client
) -> None:
    v4 = ip_address("127.0.0.1")
    client.lookup_tuple(("::1", 1, 0, 0), ("fe80::1%lo", 2, 0, 1), 3)
    client.lookup_tuple(peercred.Endpoint(v4, 1), peercred.Endpoint(v4, 2))

    assert canned.keys == [
        pb.ConnectionKey(
            local=endpoint(("::1", 1)), remote=endpoint(("fe80::1%lo", 2)), netns_cookie=3
        ),
        pb.ConnectionKey(local=endpoint(("127.0.0.1", 1)), remote=endpoint(("127.0.0.1", 2))),
    ]


HERE = ("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("lookup_cookie", (-1,), "cookie"),
        ("lookup_cookie", (2**64,), "cookie"),
        ("lookup_cookie", ("1",), "cookie"),
        ("lookup_cookie", (1, -1), "netns_cookie"),
        ("lookup_tuple", (("127.0.0.1", -1), HERE), "local"),
        ("lookup_tuple", (("127.0.0.1", 2**32), HERE), "local"),
        ("lookup_tuple", (HERE, ("127.0.0.1", None)), "remote"),
        ("lookup_tuple", (HERE, ("127.0.0.1",)), "remote"),
        ("lookup_tuple", ("127.0.0.1:1", HERE), "local"),
        ("lookup_tuple", (HERE, None), "remote"),
        ("lookup_tuple", (HERE, HERE, 2**64), "netns_cookie"),
        ("connections", (), "client_uid"),
    ],
)
def test_a_malformed_argument_is_named_without_asking_the_daemon(
    canned: CannedDaemon,
    client: Client,
    method: str,
    arguments: tuple[object, ...],
    field: str,
) -> None:
    options = {"client_uid": -1} if method == "connections" else {}
    with pytest.raises(InvalidArgument) as caught:
        getattr(client, method)(*arguments, **options)

    assert caught.value.field == field
    assert canned.keys == []


@pytest.mark.parametrize(
    ("answer", "kind", "attributes"),
    [
        (NEVER_SEEN, peercred.NotFound, {"reason": "NEVER_SEEN"}),
        (failure(code_pb2.NOT_FOUND, "no such"), peercred.NotFound, {"reason": ""}),
        (
            failure(code_pb2.INVALID_ARGUMENT, "bad", "INVALID_KEY", field="key.local"),
            peercred.InvalidArgument,
            {"field": "key.local"},
        ),
        (failure(code_pb2.INVALID_ARGUMENT, "bad"), peercred.InvalidArgument, {"field": ""}),
        (
            failure(code_pb2.UNAVAILABLE, "capture is gone: restart it", "CAPTURE_LOST"),
            peercred.Unavailable,
            {},
        ),
        (failure(code_pb2.PERMISSION_DENIED, "not yours"), peercred.Refused, {}),
        (failure(code_pb2.UNAUTHENTICATED, "who are you"), peercred.Refused, {}),
        (failure(code_pb2.DEADLINE_EXCEEDED, "slow", "X"), peercred.DeadlineExceeded, {}),
        (failure(code_pb2.INTERNAL, "see the log"), peercred.PeerCredError, {}),
    ],
)
def test_each_failure_of_the_daemon_has_its_type_and_keeps_its_text(
    canned: CannedDaemon,
    client: Client,
    answer: Status,
    kind: type[PeerCredError],
    attributes: dict[str, str],
) -> None:
    canned.answer = answer

    with pytest.raises(PeerCredError) as caught:
        client.lookup_tuple(HERE, HERE)
    (in_a_batch,) = client.lookup_many([(HERE, HERE)])

    for error in (caught.value, in_a_batch):
        assert type(error) is kind
        assert answer.message in str(error)
        assert vars(error) == attributes


def test_a_method_that_the_daemon_does_not_have_is_an_error_that_says_so(
    canned: CannedDaemon, client: Client
) -> None:
    canned.answer = failure(code_pb2.UNIMPLEMENTED, "no such method")

    with pytest.raises(PeerCredError, match="UNIMPLEMENTED: no such method"):
        client.lookup_cookie(1)


@pytest.mark.parametrize(
    "error", [NotFound("text", "RETIRED"), InvalidArgument("text", "local")], ids=repr
)
def test_an_error_survives_pickling(error: PeerCredError) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), str(copy), vars(copy)) == (type(error), "text", vars(error))


def test_threads_can_share_a_client_and_each_gets_its_own_answer(canned: CannedDaemon) -> None:
    canned.answers = {cookie: found(cookie) for cookie in range(2000)}
    start = threading.Barrier(8)

    with Client(canned.address) as shared, ThreadPoolExecutor(8) as threads:

        def ask(thread: int) -> None:
            start.wait()
            for cookie in range(thread, 2000, 8):
                assert shared.lookup_cookie(cookie).server_socket_cookie == cookie

        list(threads.map(ask, range(8)))


def test_the_library_needs_neither_the_daemon_nor_bcc_nor_what_the_cli_needs() -> None:
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, peercred\n"
            "extra = {'peercredd', 'bcc', 'click', 'rich', 'structlog', 'pyroute2', 'msgspec'}\n"
            "sys.exit(str(extra & set(sys.modules)) if extra & set(sys.modules) else 0)\n",
        ],
        check=True,
    )


def test_all_that_is_public_is_there() -> None:
    assert all(hasattr(peercred, name) for name in peercred.__all__)
