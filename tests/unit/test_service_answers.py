import os
import socket
from collections.abc import Iterator

import pytest
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from harness.memory_view import LOOPBACK, OWN_NETNS, MemoryView, connection
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.figures import FOUND, Figures
from peercredd.records import Connection
from peercredd.service import MAX_BATCH_KEYS, PAGE, PeerCredentialsService, RequestError
from peercredd.store import Reason

SERVER_END = pb.Endpoint(address="127.0.0.1", port=8080)
CLIENT_END = pb.Endpoint(address="127.0.0.1", port=50000)
TO_SERVER = pb.ConnectionKey(local=CLIENT_END, remote=SERVER_END)
TO_CLIENT = pb.ConnectionKey(local=SERVER_END, remote=CLIENT_END)
ELSEWHERE = "192.0.2.1"  # TEST-NET-1: no host has it


def by_cookie(cookie: int) -> pb.ConnectionKey:
    return pb.ConnectionKey(socket_cookie=cookie)


def with_tuple(key: pb.ConnectionKey, between: pb.ConnectionKey) -> pb.ConnectionKey:
    both = pb.ConnectionKey()
    both.CopyFrom(between)
    both.MergeFrom(key)
    return both


def lookup(view: MemoryView, key: pb.ConnectionKey) -> pb.LookupResponse:
    return PeerCredentialsService(view).lookup(pb.LookupRequest(key=key))


def failure(view: MemoryView, key: pb.ConnectionKey) -> Status:
    with pytest.raises(RequestError) as raised:
        lookup(view, key)
    return raised.value.status


def info(status: Status) -> ErrorInfo:
    (detail,) = status.details
    error_info = ErrorInfo()
    assert detail.Unpack(error_info)
    assert error_info.domain == "peercred.v1"
    return error_info


def batch(view: MemoryView, *asked: pb.ConnectionKey) -> list[pb.LookupResult]:
    merged = pb.BatchLookupResponse()
    for page in PeerCredentialsService(view).batch_lookup(pb.BatchLookupRequest(keys=asked)):
        merged.MergeFrom(page)
    return list(merged.results)


def listed(view: MemoryView, **filters: int) -> list[int]:
    pages = PeerCredentialsService(view).list_connections(pb.ListConnectionsRequest(**filters))
    return [found.server_socket_cookie for page in pages for found in page.connections]


@pytest.fixture
def view() -> MemoryView:
    return MemoryView(connection(10))


def test_the_server_is_told_of_the_client(view: MemoryView) -> None:
    found = lookup(view, by_cookie(10))

    assert found.peer_end == pb.END_CLIENT
    assert found.basis == pb.BASIS_SOCKET
    assert found.peer.uid == 1000
    assert (found.server_socket_cookie, found.client_socket_cookie) == (10, 1_000_010)
    assert found.netns_cookie == OWN_NETNS
    assert found.established_time_ns == 9_000_000_003


def test_the_client_is_told_of_the_server(view: MemoryView) -> None:
    found = lookup(view, by_cookie(1_000_010))

    assert found.peer_end == pb.END_SERVER
    assert found.peer.uid == 2000


@pytest.mark.parametrize(
    ("key", "peer"),
    [(by_cookie(10), 1000), (by_cookie(1_000_010), 2000), (TO_CLIENT, 1000), (TO_SERVER, 2000)],
)
def test_either_end_is_told_who_accepted_beside_the_answer_and_not_in_its_place(
    key: pb.ConnectionKey, peer: int
) -> None:
    before = lookup(MemoryView(connection(10)), key)
    after = lookup(MemoryView(connection(10, acceptor_uid=0)), key)

    assert not before.HasField("acceptor")
    assert after.HasField("acceptor")
    assert (after.peer.uid, after.acceptor.uid) == (peer, 0)
    after.ClearField("acceptor")
    assert after == before


@pytest.mark.parametrize(("key", "end"), [(TO_CLIENT, pb.END_CLIENT), (TO_SERVER, pb.END_SERVER)])
def test_an_answer_to_a_tuple_says_so(
    view: MemoryView, key: pb.ConnectionKey, end: pb.End.ValueType
) -> None:
    found = lookup(view, key)

    assert found.basis == pb.BASIS_TUPLE
    assert found.peer_end == end


def test_a_tuple_is_looked_for_in_the_namespace_it_names_or_the_daemons_own() -> None:
    view = MemoryView(connection(10, client_uid=1), connection(11, client_uid=2, netns_cookie=7))
    elsewhere = with_tuple(pb.ConnectionKey(netns_cookie=7), TO_CLIENT)

    assert lookup(view, TO_CLIENT).peer.uid == 1
    assert lookup(view, elsewhere).peer.uid == 2
    assert lookup(view, elsewhere).netns_cookie == 7


@pytest.mark.parametrize("cookie", [10, 1_000_010])
def test_cookie_and_tuple_that_agree_rest_on_the_socket(view: MemoryView, cookie: int) -> None:
    own_tuple = TO_CLIENT if cookie == 10 else TO_SERVER
    key = with_tuple(pb.ConnectionKey(socket_cookie=cookie, netns_cookie=OWN_NETNS), own_tuple)

    found = lookup(view, key)

    assert found.basis == pb.BASIS_SOCKET


def test_a_tuple_agrees_in_whatever_form_its_addresses_are_written(view: MemoryView) -> None:
    mapped = pb.ConnectionKey(
        local=pb.Endpoint(address="::ffff:127.0.0.1", port=8080),
        remote=pb.Endpoint(address="::ffff:7f00:1", port=50000),
    )

    assert lookup(view, with_tuple(by_cookie(10), mapped)).peer.uid == 1000


@pytest.mark.parametrize(
    ("disagreeing", "field"),
    [
        (TO_SERVER, "key.local"),
        (
            pb.ConnectionKey(local=SERVER_END, remote=pb.Endpoint(address="127.0.0.1", port=1)),
            "key.remote",
        ),
        (
            pb.ConnectionKey(local=SERVER_END, remote=pb.Endpoint(address="127.0.0.2", port=50000)),
            "key.remote",
        ),
        (pb.ConnectionKey(netns_cookie=7), "key.netns_cookie"),
        (with_tuple(pb.ConnectionKey(netns_cookie=7), TO_CLIENT), "key.netns_cookie"),
    ],
)
def test_a_cookie_and_anything_else_that_is_not_its_sockets_is_refused(
    view: MemoryView, disagreeing: pb.ConnectionKey, field: str
) -> None:
    status = failure(view, with_tuple(by_cookie(10), disagreeing))

    assert status.code == code_pb2.INVALID_ARGUMENT
    assert info(status).reason == "KEYS_DISAGREE"
    assert info(status).metadata["field"] == field


@pytest.mark.parametrize("reason", list(Reason))
def test_an_unknown_cookie_is_never_answered_by_its_tuple(view: MemoryView, reason: Reason) -> None:
    view.reasons[11] = reason
    assert lookup(view, TO_CLIENT)

    status = failure(view, with_tuple(by_cookie(11), TO_CLIENT))

    assert status.code == code_pb2.NOT_FOUND
    assert info(status).reason == reason.value
    assert status.message


def test_a_wrong_key_is_refused_naming_the_field(view: MemoryView) -> None:
    status = failure(view, pb.ConnectionKey(local=SERVER_END))

    assert status.code == code_pb2.INVALID_ARGUMENT
    assert info(status).reason == "INVALID_KEY"
    assert info(status).metadata["field"] == "key.remote"
    assert status.message.startswith("key.remote: ")


def test_a_request_without_a_key_is_refused(view: MemoryView) -> None:
    with pytest.raises(RequestError) as raised:
        PeerCredentialsService(view).lookup(pb.LookupRequest())

    assert info(raised.value.status).metadata["field"] == "key"


@pytest.mark.parametrize("attached", [{}, {"connect4": True, "sock_ops": False}])
def test_while_capture_is_lost_nothing_is_said_to_be_never_seen(
    view: MemoryView, attached: dict[str, bool]
) -> None:
    view.attached = attached
    view.reasons[12] = Reason.RETIRED

    never_seen = failure(view, by_cookie(11))
    assert never_seen.code == code_pb2.UNAVAILABLE
    assert info(never_seen).reason == "CAPTURE_LOST"
    assert info(failure(view, by_cookie(12))).reason == "RETIRED"
    assert lookup(view, by_cookie(10)).peer.uid == 1000


def test_attachments_are_asked_for_only_when_something_was_never_seen(view: MemoryView) -> None:
    lookup(view, by_cookie(10))
    batch(view, by_cookie(10))
    assert view.attachments_asked == 0

    batch(view, *[by_cookie(11)] * PAGE)
    assert view.attachments_asked == 1


@pytest.mark.parametrize(
    ("local", "remote", "reason"),
    [
        ("127.0.0.1", "127.0.0.1", "NEVER_SEEN"),
        ("127.0.0.1", "127.7.7.7", "NEVER_SEEN"),
        ("127.0.0.1", ELSEWHERE, "NOT_LOCAL"),
        (ELSEWHERE, "127.0.0.1", "NOT_LOCAL"),
        ("::ffff:127.0.0.1", f"::ffff:{ELSEWHERE}", "NOT_LOCAL"),
        ("::1", "::1", "NEVER_SEEN"),
        ("::1", "2001:db8::1", "NOT_LOCAL"),
        ("::1", "fe80::1%lo", "NEVER_SEEN"),
    ],
)
def test_a_tuple_never_seen_says_if_it_leaves_the_host(
    local: str, remote: str, reason: str
) -> None:
    key = pb.ConnectionKey(
        local=pb.Endpoint(address=local, port=1), remote=pb.Endpoint(address=remote, port=2)
    )

    assert info(failure(MemoryView(), key)).reason == reason


def test_every_address_of_this_host_is_local() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))  # sends nothing: asks which own address would
        except OSError:
            pytest.skip("this host has no address but loopback")
        own = probe.getsockname()[0]
    end = pb.Endpoint(address=own, port=1)

    assert info(failure(MemoryView(), pb.ConnectionKey(local=end, remote=end))).reason == (
        "NEVER_SEEN"
    )


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (pb.ConnectionKey(socket_cookie=11, netns_cookie=OWN_NETNS), "NOT_LOCAL"),
        (pb.ConnectionKey(socket_cookie=11), "NEVER_SEEN"),
        (pb.ConnectionKey(netns_cookie=7), "NEVER_SEEN"),
    ],
)
def test_of_addresses_in_another_namespace_nothing_is_claimed(
    beside: pb.ConnectionKey, reason: str
) -> None:
    remote = pb.ConnectionKey(local=SERVER_END, remote=pb.Endpoint(address=ELSEWHERE, port=50000))

    assert info(failure(MemoryView(), with_tuple(beside, remote))).reason == reason


def test_a_batch_is_answered_key_by_key_as_lookup_would(view: MemoryView) -> None:
    view.reasons[12] = Reason.RETIRED
    asked = [
        by_cookie(10),
        by_cookie(11),
        by_cookie(0),
        TO_SERVER,
        by_cookie(12),
        with_tuple(by_cookie(10), TO_SERVER),
        pb.ConnectionKey(),
    ] * 60

    results = batch(view, *asked)

    assert len(results) == len(asked) > PAGE
    for index, (key, result) in enumerate(zip(asked, results, strict=True)):
        if result.WhichOneof("result") == "found":
            assert result.found == lookup(view, key)
        else:
            # The field is named by its place in the batch.
            alone = failure(view, key)
            assert result.error.code == alone.code
            assert result.error.message == alone.message.replace("key", f"keys[{index}]", 1)


def test_a_wrong_key_in_a_batch_is_named_by_its_index(view: MemoryView) -> None:
    wrong = pb.ConnectionKey(local=pb.Endpoint(address="localhost", port=1), remote=CLIENT_END)

    *_, third = batch(view, *[by_cookie(10)] * 3, wrong)

    assert info(third.error).metadata["field"] == "keys[3].local.address"


def test_a_batch_has_at_most_a_thousand_keys(view: MemoryView) -> None:
    assert len(batch(view, *[by_cookie(10)] * MAX_BATCH_KEYS)) == 1000

    with pytest.raises(RequestError) as raised:
        batch(view, *[by_cookie(10)] * 1001)

    assert raised.value.status.code == code_pb2.INVALID_ARGUMENT
    assert info(raised.value.status).reason == "TOO_MANY_KEYS"
    assert info(raised.value.status).metadata["field"] == "keys"


def test_an_empty_batch_has_an_empty_answer(view: MemoryView) -> None:
    assert batch(view) == []


def test_a_stream_gets_found_and_not_found_alike(view: MemoryView) -> None:
    service = PeerCredentialsService(view)

    found = service.lookup_stream(pb.LookupStreamRequest(key=by_cookie(10)))
    missing = service.lookup_stream(pb.LookupStreamRequest(key=by_cookie(11)))
    wrong = service.lookup_stream(pb.LookupStreamRequest())

    assert found.result.found == lookup(view, by_cookie(10))
    assert missing.result.WhichOneof("result") == "error"
    assert info(missing.result.error).reason == "NEVER_SEEN"
    assert info(wrong.result.error).metadata["field"] == "key"


def test_a_list_is_of_every_connection_once() -> None:
    view = MemoryView(*(connection(cookie) for cookie in range(1, 251)))
    pages = list(PeerCredentialsService(view).list_connections(pb.ListConnectionsRequest()))

    assert [len(page.connections) for page in pages] == [100, 100, 50]
    assert listed(view) == list(range(1, 251))


def test_a_list_leaves_out_what_retired_and_adds_nothing_after_it_began() -> None:
    view = MemoryView(*(connection(cookie) for cookie in range(1, 201)))
    pages = PeerCredentialsService(view).list_connections(pb.ListConnectionsRequest())
    first = next(pages)
    del view.connections[1], view.connections[150]
    view.connections[999] = connection(999)

    sent = [first, *pages]

    cookies = [found.server_socket_cookie for page in sent for found in page.connections]
    assert cookies == [*range(1, 150), *range(151, 201)]


def test_the_first_page_of_a_list_waits_for_no_other() -> None:
    read: list[int] = []

    class Counting(MemoryView):
        def pages(self, size: int) -> Iterator[list[Connection]]:
            for page in super().pages(size):
                read.append(len(page))
                yield page

    view = Counting(*(connection(cookie) for cookie in range(1, 1001)))
    pages = PeerCredentialsService(view).list_connections(pb.ListConnectionsRequest())

    assert len(next(pages).connections) == PAGE
    assert read == [PAGE]


def test_each_outcome_of_a_lookup_is_counted() -> None:
    figures = Figures()
    view = MemoryView(connection(10))
    service = PeerCredentialsService(view, figures=figures)
    service.lookup(pb.LookupRequest(key=by_cookie(10)))
    for attached in (True, False):
        view.attached = dict.fromkeys(view.attached, attached)
        with pytest.raises(RequestError):
            service.lookup(pb.LookupRequest(key=by_cookie(11)))

    assert figures.lookups == {FOUND: 1, "NEVER_SEEN": 1, "CAPTURE_LOST": 1}


def test_filters_of_a_list_are_all_to_be_passed() -> None:
    view = MemoryView(
        connection(1, client_uid=0, server_port=80),
        connection(2, client_uid=0, server_port=443),
        connection(3, client_uid=5, server_port=80),
        connection(4, client_uid=5, server_port=80, netns_cookie=7),
    )

    assert listed(view, client_uid=0) == [1, 2]
    assert listed(view, server_port=80) == [1, 3, 4]
    assert listed(view, netns_cookie=7) == [4]
    assert listed(view, client_uid=5, server_port=80, netns_cookie=OWN_NETNS) == [3]
    assert listed(view, client_uid=6) == []


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_does_not_exist_is_no_filter(view: MemoryView, port: int) -> None:
    with pytest.raises(RequestError) as raised:
        listed(view, server_port=port)

    assert raised.value.status.code == code_pb2.INVALID_ARGUMENT
    assert info(raised.value.status).metadata["field"] == "server_port"


def test_status_says_what_runs_and_what_was_dropped(view: MemoryView) -> None:
    view.attached = {"connect4": True, "sock_ops": False}
    view.counts = {"sock_ops": (5, 0)}

    status = PeerCredentialsService(view).get_status(pb.GetStatusRequest())

    assert status.version
    assert status.hook_set == "cgroup"
    assert status.cgroup == "/sys/fs/cgroup"
    assert status.kernel_release == os.uname().release
    assert status.daemon_pid == os.getpid()
    assert status.netns_cookie == OWN_NETNS
    assert [
        (table.name, table.entries, table.max_entries, table.max_entries_per_user)
        for table in status.tables
    ] == [("connections", 1, 131072, 32768)]
    assert [(drop.reason, drop.count, drop.description) for drop in status.drops] == [
        ("PENDING_FULL", 0, "no room"),
        ("OTHER_SYN", 3, "another SYN"),
    ]
    assert list(status.missing_fields) == ["login_uid"]
    assert [(part.program, part.attached) for part in status.attachments] == [
        ("connect4", True),
        ("sock_ops", False),
    ]
    without_figures, with_figures = status.attachments
    assert not without_figures.HasField("run_count")
    assert not without_figures.HasField("missed_count")
    assert with_figures.HasField("missed_count")
    assert (with_figures.run_count, with_figures.missed_count) == (5, 0)
    assert [(unused.hook_set, unused.reason) for unused in status.unused_hook_sets] == [
        ("trace", "the kernel cannot attach to tcp_connect")
    ]


def test_missed_runs_do_not_make_a_capture_lost(view: MemoryView) -> None:
    view.counts = {"connect4": (1000, 999)}

    assert PeerCredentialsService(view).capture_in_place()


def test_a_view_that_sees_less_answers_less() -> None:
    class OfOneUser(MemoryView):
        def __init__(self, uid: int, *connections: Connection) -> None:
            super().__init__(*(each for each in connections if each.client.euid == uid))

    everything = connection(10, client_uid=1), connection(11, client_uid=2, client_port=9)
    view = OfOneUser(2, *everything)

    assert listed(view) == [11]
    assert info(failure(view, by_cookie(10))).reason == "NEVER_SEEN"
    assert everything[0].tuple.client_address == LOOPBACK
