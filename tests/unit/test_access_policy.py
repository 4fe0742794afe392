from __future__ import annotations

import grp
import os
import struct

import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from structlog.testing import capture_logs

from harness.memory_view import LOOPBACK, OWN_NETNS, MemoryView, connection, credentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.access import AccessError, Caller, OwnView, Policy, Refusals, Refused
from peercredd.records import Credentials
from peercredd.service import PeerCredentialsService, RequestError
from peercredd.store import Answer, Reason

LISTENER, CLIENT, ACCEPTOR, STRANGER = 2000, 1000, 3000, 4000
SERVER_COOKIE, CLIENT_COOKIE = 10, 1_000_010
OWN_CONNECTION = 77
OWN_GROUP = grp.getgrgid(os.getegid()).gr_name


def view_of(uid: int, source: MemoryView, *, listener_details: bool = False) -> OwnView:
    return OwnView(
        source, Caller(uid, OWN_CONNECTION), Refusals(), listener_details=listener_details
    )


def policy(
    users: tuple[str, ...] = (), groups: tuple[str, ...] = (), details: bool = False
) -> Policy:
    return Policy.of(OWN_GROUP, users, groups, listener_details=details)


def peer(found: Answer | Reason) -> Credentials:
    assert isinstance(found, Answer)
    return found.peer


@pytest.mark.parametrize(
    ("uid", "server_end", "client_end"),
    [
        (LISTENER, CLIENT, None),
        (ACCEPTOR, CLIENT, None),
        (CLIENT, None, LISTENER),
        (STRANGER, None, None),
    ],
)
def test_each_end_is_told_of_the_other_and_nobody_else_is(
    uid: int, server_end: int | None, client_end: int | None
) -> None:
    view = view_of(uid, MemoryView(connection(SERVER_COOKIE, acceptor_uid=ACCEPTOR)))
    ends = LOOPBACK, 8080, LOOPBACK, 50000
    for found, expected in (
        (view.find_by_socket(SERVER_COOKIE), server_end),
        (view.find_by_tuple(OWN_NETNS, *ends), server_end),
        (view.find_by_socket(CLIENT_COOKIE), client_end),
        (view.find_by_tuple(OWN_NETNS, *ends[2:], *ends[:2]), client_end),
    ):
        told = found.peer.euid if isinstance(found, Answer) else None
        assert told == expected
        assert isinstance(found, Answer) or found is Reason.NOT_VISIBLE


def test_who_accepted_is_told_at_the_servers_end_only() -> None:
    source = MemoryView(connection(SERVER_COOKIE, acceptor_uid=ACCEPTOR))
    at_server = view_of(LISTENER, source).find_by_socket(SERVER_COOKIE)
    at_client = view_of(CLIENT, source).find_by_socket(CLIENT_COOKIE)
    of_both = connection(SERVER_COOKIE, client_uid=LISTENER, acceptor_uid=ACCEPTOR)
    to_itself = view_of(LISTENER, MemoryView(of_both)).find_by_socket(CLIENT_COOKIE)

    assert isinstance(at_server, Answer)
    assert at_server.acceptor
    assert isinstance(at_client, Answer)
    assert at_client.acceptor is None
    assert isinstance(to_itself, Answer)
    assert to_itself.acceptor


@pytest.mark.parametrize("details", [False, True])
def test_details_of_others_listeners_are_told_where_the_policy_says_so(details: bool) -> None:
    source = MemoryView(connection(SERVER_COOKIE))
    view = view_of(CLIENT, source, listener_details=details)
    access = policy(details=details).access(credentials(CLIENT))
    service = PeerCredentialsService(view, access)
    answer = service.lookup(pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=CLIENT_COOKIE)))

    told = {field.name for field, _ in answer.peer.ListFields()}
    usual = {"pid", "uid", "gid", "groups", "group_count"}
    assert (told == usual) is not details
    assert told >= usual


def test_details_of_ones_own_listener_are_told() -> None:
    own = connection(SERVER_COOKIE, client_uid=LISTENER)
    told = peer(view_of(LISTENER, MemoryView(own)).find_by_socket(CLIENT_COOKIE))

    assert told == own.listener


def test_an_acceptor_of_anothers_listener_is_listed_no_details_of_it() -> None:
    source = MemoryView(connection(SERVER_COOKIE, acceptor_uid=ACCEPTOR))
    service = PeerCredentialsService(
        view_of(ACCEPTOR, source), policy().access(credentials(ACCEPTOR))
    )
    (page,) = service.list_connections(pb.ListConnectionsRequest())
    (listed,) = page.connections

    assert listed.client.HasField("comm")
    assert listed.acceptor.HasField("comm")
    assert not listed.listener.HasField("comm")
    assert listed.listener.uid == LISTENER


def test_a_client_whose_listener_is_not_known_is_told_as_if_there_were_nothing() -> None:
    source = MemoryView(connection(SERVER_COOKIE, listener_cookie=0))

    assert view_of(CLIENT, source).find_by_socket(CLIENT_COOKIE) is Reason.NOT_VISIBLE
    assert source.spent == 1


def test_every_search_that_finds_nothing_is_made_as_long_and_counted_once() -> None:
    source = MemoryView(connection(SERVER_COOKIE))
    refusals = Refusals()
    view = OwnView(source, Caller(STRANGER, OWN_CONNECTION), refusals, listener_details=False)
    view.find_by_socket(SERVER_COOKIE)
    view.find_by_socket(99)

    assert source.spent == 2
    assert refusals.counts[Refused.NOT_VISIBLE] == 1


@pytest.mark.parametrize("attached", [True, False])
def test_forbidden_and_absent_fail_alike_whatever_the_state_of_the_capture(attached: bool) -> None:
    source = MemoryView(connection(SERVER_COOKIE))
    source.attached["connect4"] = attached
    service = PeerCredentialsService(
        view_of(STRANGER, source), policy().access(credentials(STRANGER))
    )
    failures = []
    for cookie in (SERVER_COOKIE, 99):
        with pytest.raises(RequestError) as caught:
            service.lookup(pb.LookupRequest(key=pb.ConnectionKey(socket_cookie=cookie)))
        failures.append(caught.value.status)

    assert failures[0] == failures[1]
    info = ErrorInfo()
    assert failures[0].details[0].Unpack(info)
    assert info.reason == ("NOT_VISIBLE" if attached else "CAPTURE_LOST")


def test_keys_that_disagree_are_pointed_out_where_the_connection_is_ones_own() -> None:
    service = PeerCredentialsService(
        view_of(LISTENER, MemoryView(connection(SERVER_COOKIE))),
        policy().access(credentials(LISTENER)),
    )
    other = pb.Endpoint(address="127.0.0.1", port=9)
    key = pb.ConnectionKey(socket_cookie=SERVER_COOKIE, local=other, remote=other)
    with pytest.raises(RequestError, match="not that of the socket"):
        service.lookup(pb.LookupRequest(key=key))


def test_root_named_users_and_members_of_groups_see_all_and_nobody_else() -> None:
    groups = struct.pack("32I", *range(100, 132))
    some = credentials(1000)._replace(groups=groups, group_count=32)
    cases = {
        "you are root": (policy(), some._replace(euid=0)),
        "you are the user 1000 of access.users": (policy(users=("1000",)), some),
        "you are in the group 131 of access.groups": (policy(groups=("131",)), some),
        f"you are in the group {OWN_GROUP}": (policy(), some._replace(egid=os.getegid())),
    }
    for why, (allowing, caller) in cases.items():
        access = allowing.access(caller)
        assert (access.sees_all, access.why) == (True, why)
    others_groups = struct.pack("32I", *range(200, 232))
    others = (
        some._replace(uid=0, suid=0, fsuid=0, groups=others_groups),
        some._replace(gid=131, sgid=131, groups=others_groups),
        # What is beyond the count is not the task's, and what is beyond 32 was not recorded.
        some._replace(group_count=31),
        some._replace(group_count=33, groups=others_groups),
    )
    for nobody in others:
        assert not policy(groups=("131",)).access(nobody).sees_all
    assert not policy().access(some).sees_all


@pytest.mark.parametrize("option", ["users", "groups"])
def test_a_name_that_does_not_exist_is_an_error_of_one_line(option: str) -> None:
    with pytest.raises(AccessError) as caught:
        policy(**{option: ("no-such",)})  # type: ignore[arg-type]

    assert f"access.{option}: there is no {option[:-1]} 'no-such'; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_services_group_that_does_not_exist_has_no_members() -> None:
    nobody = Policy.of("no-such-group", (), (), listener_details=False)

    assert nobody.groups == {}
    assert nobody.access(credentials(0)).sees_all


def test_a_limited_caller_may_name_its_own_namespaces_and_no_others() -> None:
    caller = credentials(1000)
    own = policy().access(caller)
    unknown = policy().access(caller._replace(known=0))
    sees_all = policy(users=("1000",)).access(caller)

    assert own.may_name("pid_namespace", caller.pid_namespace)
    assert own.may_name("user_namespace", caller.user_namespace)
    assert not own.may_name("user_namespace", caller.pid_namespace)
    assert not unknown.may_name("pid_namespace", caller.pid_namespace)
    assert sees_all.may_name("pid_namespace", 1)


def test_refusals_are_logged_in_a_few_lines_however_many_there_were() -> None:
    refusals = Refusals()
    for uid in range(5000):
        refusals.count(Refused.NOT_VISIBLE, uid)
        refusals.count(Refused.NOT_VISIBLE, 7, 2)
    refusals.count(Refused.CALLER_UNKNOWN, None, 0)
    with capture_logs() as logs:
        refusals.write_log()
        refusals.write_log()

    assert len(logs) == 9
    assert logs[0]["uid"] == 7 or logs[1]["uid"] == 7
    assert sum(line["times"] for line in logs) == 15000
    assert refusals.counts[Refused.NOT_VISIBLE] == 15000
    assert not any(line.get("reason") == "CALLER_UNKNOWN" for line in logs)


def test_the_status_of_who_sees_all_has_the_refusals() -> None:
    refusals = Refusals()
    refusals.count(Refused.TOO_MANY_CALLS, 5)
    status = PeerCredentialsService(MemoryView(), refusals=refusals).get_status(
        pb.GetStatusRequest()
    )

    assert {each.reason: each.count for each in status.refusals} == {
        "NOT_VISIBLE": 0,
        "CALLER_UNKNOWN": 0,
        "TOO_MANY_CALLS": 1,
        "TOO_MANY_CONNECTIONS": 0,
        "TOO_MUCH_SENT": 0,
    }
    assert all(each.description for each in status.refusals)


def test_on_the_unix_socket_one_sees_all_and_nobody_is_named() -> None:
    told = PeerCredentialsService(MemoryView()).who_am_i(pb.WhoAmIRequest())

    assert (told.transport, told.scope) == (pb.TRANSPORT_UNIX_SOCKET, pb.SCOPE_ALL)
    assert not told.HasField("caller")


def test_listed_is_nothing_of_others() -> None:
    ours, theirs = connection(10), connection(11)
    theirs = theirs._replace(listener=credentials(STRANGER))
    service = PeerCredentialsService(
        view_of(LISTENER, MemoryView(theirs, ours)), policy().access(credentials(LISTENER))
    )
    listed = [
        each.server_socket_cookie
        for page in service.list_connections(pb.ListConnectionsRequest())
        for each in page.connections
    ]

    assert listed == [10]
