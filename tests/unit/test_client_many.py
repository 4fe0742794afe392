from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from google.rpc import code_pb2

import peercred
from harness.blocking_twin import BlockingTwin
from harness.canned_daemon import CannedDaemon, failure, found
from peercred import Client, DeadlineExceeded, Endpoint, InvalidArgument, NotFound, PeerCredError
from peercred.v1 import peer_credentials_pb2 as pb

HERE = ("127.0.0.1", 1)


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/peercredd.sock") as canned:
        yield canned


@pytest.fixture(params=[Client, BlockingTwin], ids=["Client", "AsyncClient"])
def kind(request: pytest.FixtureRequest) -> type[Client]:
    made: type[Client] = request.param
    return made


@pytest.fixture
def client(kind: type[Client], canned: CannedDaemon) -> Iterator[Client]:
    with kind(canned.address) as client:
        yield client


def recorded(cookie: int = 1) -> pb.Connection:
    return pb.Connection(
        server_socket_cookie=cookie,
        client_socket_cookie=cookie + 1,
        netns_cookie=5,
        client_endpoint=pb.Endpoint(address="::ffff:127.0.0.1", port=40000),
        server_endpoint=pb.Endpoint(address="::1", port=80),
        established_time_ns=6,
        client=pb.Credentials(pid=7, uid=8, gid=9),
    )


def page(*connections: pb.Connection) -> pb.ListConnectionsResponse:
    return pb.ListConnectionsResponse(connections=connections)


@pytest.mark.parametrize(
    ("count", "batches"),
    [(0, []), (1, [1]), (1000, [1000]), (1001, [1000, 1]), (2500, [1000, 1000, 500])],
)
def test_questions_go_out_a_thousand_at_a_time_and_are_answered_in_order(
    canned: CannedDaemon, client: Client, count: int, batches: list[int]
) -> None:
    questions = (((f"127.0.0.{port % 250}", port), HERE) for port in range(1, count + 1))

    answers = client.lookup_many(questions)

    assert canned.batch_sizes == batches
    assert [key.local.port for key in canned.keys] == list(range(1, count + 1))
    assert len(answers) == count
    assert all(isinstance(answer, peercred.PeerCredentials) for answer in answers)


def test_one_that_fails_stands_in_its_place_and_does_not_fail_the_others(
    canned: CannedDaemon, client: Client
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as connecting,
        listener.accept()[0] as accepted,
        socket.socket() as unconnected,
    ):

        def cookie(sock: socket.socket) -> int:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)

        never_seen = failure(code_pb2.NOT_FOUND, "never", "NEVER_SEEN")
        canned.answers = {
            cookie(accepted): found(11),
            cookie(unconnected): never_seen,
            cookie(connecting): never_seen,
        }
        no_uid = found()
        no_uid.peer.ClearField("uid")
        canned.answer = no_uid

        answers = client.lookup_many(
            [listener, accepted, unconnected, connecting, (HERE, HERE), (HERE,), accepted]  # type: ignore[list-item]
        )

    assert isinstance(answers[0], InvalidArgument)
    assert isinstance(answers[1], peercred.PeerCredentials)
    assert answers[1].server_socket_cookie == 11
    assert isinstance(answers[2], InvalidArgument)
    assert isinstance(answers[3], NotFound)
    assert type(answers[4]) is PeerCredError
    assert isinstance(answers[5], InvalidArgument)
    assert answers[6] == answers[1]


@pytest.mark.parametrize("results", [0, 1, 3])
def test_answers_that_do_not_match_the_questions_are_an_error(
    canned: CannedDaemon, client: Client, results: int
) -> None:
    canned.results = [pb.LookupResult(found=found())] * results

    with pytest.raises(PeerCredError, match=f"{results} answers to 2 questions"):
        client.lookup_many([(HERE, HERE)] * 2)


def test_an_empty_answer_is_an_error(canned: CannedDaemon, client: Client) -> None:
    canned.results = [pb.LookupResult()]

    (answer,) = client.lookup_many([(HERE, HERE)])

    assert type(answer) is PeerCredError


def test_connections_come_page_by_page_in_order(canned: CannedDaemon, client: Client) -> None:
    pages = [range(100), range(0), range(100, 130)]
    canned.pages = [page(*map(recorded, cookies)) for cookies in pages]

    listed = list(client.connections())

    assert [connection.server_socket_cookie for connection in listed] == list(range(130))
    assert canned.filters == [pb.ListConnectionsRequest()]


def test_a_connection_arrives_whole(canned: CannedDaemon, client: Client) -> None:
    whole = recorded()
    whole.listener_socket_cookie = 3
    whole.listener.CopyFrom(pb.Credentials(pid=1, uid=0, gid=0, comm=b"init"))
    whole.acceptor.CopyFrom(pb.Credentials(pid=4, uid=33, gid=34, comm=b"worker"))
    canned.pages = [page(whole, recorded())]

    with_listener, without = client.connections()

    assert with_listener == peercred.Connection(
        client_endpoint=Endpoint(ip_address("127.0.0.1"), 40000),
        server_endpoint=Endpoint(ip_address("::1"), 80),
        client=peercred.Credentials(pid=7, uid=8, gid=9),
        listener=peercred.Credentials(pid=1, uid=0, gid=0, comm="init"),
        server_socket_cookie=1,
        client_socket_cookie=2,
        listener_socket_cookie=3,
        netns_cookie=5,
        established_time_ns=6,
        acceptor=peercred.Credentials(pid=4, uid=33, gid=34, comm="worker"),
    )
    assert without.listener is None
    assert without.listener_socket_cookie is None
    assert without.acceptor is None


@pytest.mark.parametrize("missing", ["client", "client_endpoint", "server_endpoint"])
def test_a_connection_that_lacks_what_none_may_lack_is_an_error(
    canned: CannedDaemon, client: Client, missing: str
) -> None:
    broken = recorded()
    broken.ClearField(missing)  # type: ignore[arg-type]
    canned.pages = [page(broken)]

    with pytest.raises(PeerCredError, match="the daemon's answer has no"):
        list(client.connections())


def test_filters_are_sent_and_zero_is_one(canned: CannedDaemon, client: Client) -> None:
    assert list(client.connections(client_uid=0, server_port=80, netns_cookie=2)) == []

    assert canned.filters == [
        pb.ListConnectionsRequest(client_uid=0, server_port=80, netns_cookie=2)
    ]


def test_what_was_listed_before_a_failure_is_yielded_then_the_error_raised(
    canned: CannedDaemon, client: Client
) -> None:
    canned.pages = [page(recorded(1)), failure(code_pb2.UNAVAILABLE, "lost", "CAPTURE_LOST")]

    listing = iter(client.connections())

    assert next(listing).server_socket_cookie == 1
    with pytest.raises(peercred.Unavailable, match="lost"):
        next(listing)


def test_a_daemon_that_stops_in_the_middle_of_a_listing_exceeds_the_deadline(
    canned: CannedDaemon, kind: type[Client]
) -> None:
    canned.pages = [page(recorded())]
    canned.release.clear()

    with kind(canned.address, timeout=0.2) as client:
        listing = iter(client.connections())
        assert next(listing).server_socket_cookie == 1
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
            next(listing)


def test_a_slow_reader_of_a_listing_has_no_deadline(canned: CannedDaemon, client: Client) -> None:
    list(client.connections())

    assert canned.list_seconds_remaining > 3600


def test_the_status_arrives_whole(canned: CannedDaemon, client: Client) -> None:
    answer = pb.GetStatusResponse(
        version="1",
        hook_set="trace",
        kernel_release="6.18",
        cgroup="/sys/fs/cgroup",
        capture_start_time_ns=1,
        tables=[pb.GetStatusResponse.Table(name="connections", entries=2, max_entries=3)],
        drops=[pb.GetStatusResponse.Drop(reason="FULL", count=0, description="no room")],
        missing_fields=["login_uid"],
        attachments=[
            pb.GetStatusResponse.Attachment(program="tcp_connect", attached=False),
            pb.GetStatusResponse.Attachment(
                program="inet_csk_accept", attached=True, run_count=2**64 - 1, missed_count=0
            ),
        ],
        daemon_pid=4,
        netns_cookie=5,
        unused_hook_sets=[
            pb.GetStatusResponse.UnusedHookSet(hook_set="cgroup", reason="trace is preferred")
        ],
        so_peercred=[
            pb.GetStatusResponse.SoPeercred(
                target="all", source="config", cgroup="/sys/fs/cgroup", attached=True
            ),
            pb.GetStatusResponse.SoPeercred(
                target="a.service", source="enabled", waiting=True, detail="it does not run"
            ),
        ],
    )
    answer.capture_start_time.FromJsonString("2026-11-23T01:02:03.500Z")
    canned.status = answer

    assert client.status() == peercred.Status(
        version="1",
        hook_set="trace",
        kernel_release="6.18",
        cgroup="/sys/fs/cgroup",
        capture_start_time=datetime(2026, 11, 23, 1, 2, 3, 500_000, UTC),
        capture_start_time_ns=1,
        tables=(peercred.Table("connections", 2, 3),),
        drops=(peercred.Drop("FULL", 0, "no room"),),
        missing_fields=("login_uid",),
        attachments=(
            peercred.Attachment("tcp_connect", attached=False, run_count=None, missed_count=None),
            peercred.Attachment(
                "inet_csk_accept", attached=True, run_count=2**64 - 1, missed_count=0
            ),
        ),
        daemon_pid=4,
        netns_cookie=5,
        unused_hook_sets=(peercred.UnusedHookSet("cgroup", "trace is preferred"),),
        so_peercred=(
            peercred.SoPeercred("all", "config", "/sys/fs/cgroup", attached=True),
            peercred.SoPeercred(
                "a.service", "enabled", None, attached=False, waiting=True, detail="it does not run"
            ),
        ),
    )
