from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from harness import caller, steps
from harness.actors import Actor, Origin
from harness.caller import Reply
from harness.cgroup import Cgroup
from harness.channel import Descriptor
from harness.daemon import Daemon
from harness.netns import NetworkNamespace
from harness.patience import patient
from harness.routes import V4, V6
from harness.steps import Both
from harness.users import ALICE, BOB, CAROL, DAVE, SERVICE, STAFF
from peercred import _wire
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import keys as key_parser
from peercredd.access import Caller, OwnView, Refusals
from peercredd.callers import MAX_CALLS_PER_USER
from peercredd.libbpf import Map
from peercredd.server import MAX_CALLS_UNSEEN, MAX_CONCURRENT_TCP_CALLS, TCP_OPTIONS
from peercredd.store import Reason, Store

pytestmark = pytest.mark.kernel

PORT = 338
TCP = f"ipv4:127.0.0.1:{PORT}"
ADDRESS = "127.0.0.1", PORT
TCP_V6 = f"ipv6:[::1]:{PORT}"
API = "/peercred.v1.PeerCredentials"
STREAMS = int(dict(TCP_OPTIONS)["grpc.max_concurrent_streams"])
PROJECT = Path(__file__).parents[2]
ABSENT = 2**63 + 1
"""No socket has that cookie."""

ROOT, MEMBER, LISTENER, CLIENT, STRANGER = "root", "member", "listener", "client", "stranger"
ROLES = (ROOT, MEMBER, LISTENER, CLIENT, STRANGER)
UNKNOWN = "unknown"


class Place:
    """A network namespace with a daemon that serves on TCP, a connection, and who asks about it."""

    def __init__(
        self, cgroup: Cgroup, hook_set: str, undo: ExitStack, policy: tuple[str, ...]
    ) -> None:
        self.undo = undo
        self.namespace = undo.enter_context(NetworkNamespace())
        self.daemon = undo.enter_context(
            Daemon(
                cgroup,
                hook_set,
                *policy,
                tcp_port=PORT,
                namespace=self.namespace,
            )
        )
        self._ready = self._actor_that_can_ask(undo.enter_context(Origin(cgroup)))
        self._outside = self._actor_that_can_ask(undo.enter_context(Origin(None)))
        self.server = self.actor(SERVICE)
        self.client = self.actor(ALICE)
        self.askers = {
            ROOT: self.actor(0),
            MEMBER: self.actor(DAVE, groups=(STAFF,)),
            LISTENER: self.actor(SERVICE),
            CLIENT: self.actor(ALICE),
            STRANGER: self.actor(BOB),
            UNKNOWN: self.outsider(0),
        }
        listening = self.server(steps.bind, V4, 0, ())
        self.server(steps.listen, listening)
        self.addresses = self.server(steps.addresses, listening, V4)
        self.connected: Both[int] = self.client(steps.sockets, V4, None, ())
        self.client(steps.connect, self.connected, self.addresses)
        self.accepted: Both[int] = self.server(steps.accept, listening)
        self.server_end = self.key(self.server, self.accepted)
        self.client_end = self.key(self.client, self.connected)

    def actor(self, uid: int, groups: tuple[int, ...] = ()) -> Actor:
        """A process in the namespace and the captured cgroup, that can ask."""
        return self._become(self._ready, uid, groups)

    def outsider(self, uid: int) -> Actor:
        """The same, but out of sight of the capture."""
        return self._become(self._outside, uid)

    @contextmanager
    def sole_port(self, port: int) -> Iterator[None]:
        """Every connect() in the namespace is from that port."""
        path = Path("/proc/sys/net/ipv4/ip_local_port_range")
        before = self.namespace.run(path.read_text)
        self.namespace.run(path.write_text, f"{port} {port}")
        try:
            yield
        finally:
            self.namespace.run(path.write_text, before)

    def _become(self, ready: Actor, uid: int, groups: tuple[int, ...] = ()) -> Actor:
        actor = self.undo.enter_context(closing(ready.fork()))
        if uid:
            actor(steps.become, uid, uid, groups)
        return actor

    def _actor_that_can_ask(self, origin: Origin) -> Actor:
        actor = self.undo.enter_context(closing(origin.actor()))
        actor(steps.enter_network_namespace, Descriptor(self.namespace.fd))
        actor(caller.prepare, [str(PROJECT), str(PROJECT / "clients"), *sys.path])
        return actor

    def key(self, actor: Actor, ends: Both[int]) -> pb.ConnectionKey:
        with actor.borrow(ends.tcp) as sock:
            return _wire.key_of_socket(sock)

    def lookup(self, role: str, key: pb.ConnectionKey, address: str = TCP) -> Reply:
        request = pb.LookupRequest(key=key)
        return self.askers[role](caller.call, address, f"{API}/Lookup", request.SerializeToString())

    def status(self) -> pb.GetStatusResponse:
        reply = self.askers[ROOT](caller.call, TCP, f"{API}/GetStatus", b"")
        return pb.GetStatusResponse.FromString(reply.messages[0])

    def log_line(self, event: str) -> dict[str, Any]:
        """Wait until the daemon has logged that."""
        give_up = time.monotonic() + patient(30)
        while True:
            whole, _, _ = self.daemon.log().rpartition("\n")
            for line in map(json.loads, whole.splitlines()):
                if line["event"] == event:
                    return dict(line)
            assert time.monotonic() < give_up, self.daemon.log()

    def refused(self, reason: str) -> int:
        return next(each.count for each in self.status().refusals if each.reason == reason)


@pytest.fixture(scope="module")
def place(cgroup: Cgroup, hook_set: str) -> Iterator[Place]:
    with ExitStack() as undo:
        yield Place(cgroup, hook_set, undo, ("--access-group", str(STAFF)))


class Question(NamedTuple):
    """A way to ask about one key; `answer` makes its result a LookupResponse or a status."""

    method: str

    def ask(self, asker: Actor, key: pb.ConnectionKey) -> pb.LookupResponse | Status:
        if self.method == "Lookup":
            request: bytes = pb.LookupRequest(key=key).SerializeToString()
        elif self.method == "BatchLookup":
            request = pb.BatchLookupRequest(keys=[key]).SerializeToString()
        else:
            request = pb.LookupStreamRequest(key=key).SerializeToString()
        reply = asker(caller.call, TCP, f"{API}/{self.method}", request)
        if reply.code != "OK":
            return Status.FromString(reply.details)
        (message,) = reply.messages
        if self.method == "Lookup":
            return pb.LookupResponse.FromString(message)
        if self.method == "BatchLookup":
            (result,) = pb.BatchLookupResponse.FromString(message).results
        else:
            result = pb.LookupStreamResponse.FromString(message).result
        found = result.HasField("found")
        return (
            pb.LookupResponse.FromString(result.found.SerializeToString())
            if found
            else Status.FromString(result.error.SerializeToString())
        )


QUESTIONS = [Question(method) for method in ("Lookup", "BatchLookup", "LookupStream")]


def reason_of(status: Status) -> str:
    info = ErrorInfo()
    (detail,) = status.details
    assert detail.Unpack(info)
    return str(info.reason)


def keys(place: Place, end: pb.ConnectionKey) -> list[pb.ConnectionKey]:
    """By cookie, by tuple, and by both."""
    by_cookie = pb.ConnectionKey(socket_cookie=end.socket_cookie)
    by_tuple = pb.ConnectionKey(local=end.local, remote=end.remote)
    return [by_cookie, by_tuple, end]


def wait_for(code: str, asker: Actor, method: str) -> None:
    """Call until that comes of it: what other calls came to takes a moment to be known."""
    give_up = time.monotonic() + patient(30)
    while asker(caller.call, TCP, f"{API}/{method}", b"").code != code:
        assert time.monotonic() < give_up


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda each: each.method)
@pytest.mark.parametrize("role", ROLES)
def test_the_client_is_named_to_its_server_and_to_those_who_see_all(
    place: Place, role: str, question: Question
) -> None:
    for key in keys(place, place.server_end):
        answer = question.ask(place.askers[role], key)
        if role in (ROOT, MEMBER, LISTENER):
            assert isinstance(answer, pb.LookupResponse)
            assert (answer.peer.uid, answer.peer.pid) == (ALICE, place.client.pid)
            assert answer.peer.HasField("comm")
        else:
            assert isinstance(answer, Status)
            assert reason_of(answer) == "NOT_VISIBLE"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda each: each.method)
@pytest.mark.parametrize("role", ROLES)
def test_the_listener_is_named_to_its_client_and_to_those_who_see_all(
    place: Place, role: str, question: Question
) -> None:
    for key in keys(place, place.client_end):
        answer = question.ask(place.askers[role], key)
        if role in (ROOT, MEMBER, CLIENT):
            assert isinstance(answer, pb.LookupResponse)
            assert (answer.peer.uid, answer.peer.pid) == (SERVICE, place.server.pid)
        else:
            assert isinstance(answer, Status)
            assert reason_of(answer) == "NOT_VISIBLE"


def test_a_client_learns_of_its_listener_what_a_unix_socket_would_tell_and_no_more(
    place: Place,
) -> None:
    answer = pb.LookupResponse.FromString(place.lookup(CLIENT, place.client_end).messages[0])

    told = {field.name for field, _ in answer.peer.ListFields()}
    assert told == {"pid", "uid", "gid", "group_count"}
    assert not answer.HasField("acceptor")


def test_a_policy_may_tell_more_and_what_it_refuses_is_logged(
    cgroup: Cgroup, hook_set: str
) -> None:
    policy = "--access-user", str(BOB), "--access-listener-details"
    with ExitStack() as undo:
        place = Place(cgroup, hook_set, undo, policy)
        (first,) = place.lookup(CLIENT, place.client_end).messages
        listener = pb.LookupResponse.FromString(first).peer
        assert listener.pid == place.server.pid
        assert listener.HasField("comm")
        assert place.lookup(STRANGER, place.server_end).code == "OK"
        assert place.lookup(MEMBER, place.server_end).code == "NOT_FOUND"

        # Each minute; and before it ends.
        server = place.status().server_pid
        os.kill(server, signal.SIGTERM)
        logged = place.log_line("refused: lookups of connections that are not the caller's")
        assert (logged["reason"], logged["uid"], logged["times"]) == ("NOT_VISIBLE", DAVE, 1)


@pytest.mark.parametrize(
    "method",
    [
        f"{API}/Lookup",
        f"{API}/BatchLookup",
        f"{API}/LookupStream",
        f"{API}/ListConnections",
        f"{API}/WatchConnections",
        f"{API}/GetStatus",
        f"{API}/WhoAmI",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_a_caller_without_a_record_gets_nothing_and_is_told_what_mends_it(
    place: Place, method: str
) -> None:
    before = place.refused("CALLER_UNKNOWN")

    reply = place.askers[UNKNOWN](caller.call, TCP, method, b"")

    assert (reply.code, reply.messages) == ("UNAUTHENTICATED", [])
    assert reason_of(Status.FromString(reply.details)) == "CALLER_UNKNOWN"
    assert "ask from within the captured cgroup" in reply.text
    assert place.refused("CALLER_UNKNOWN") == before + 1


@pytest.mark.parametrize("role", ROLES)
def test_everybody_who_is_known_gets_health_and_reflection(place: Place, role: str) -> None:
    asker = place.askers[role]
    check = asker(caller.call, TCP, "/grpc.health.v1.Health/Check", b"")
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = asker(
        caller.call,
        TCP,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        question.SerializeToString(),
    )

    assert health_pb2.HealthCheckResponse.FromString(check.messages[0]).status == 1
    services = reflection_pb2.ServerReflectionResponse.FromString(listed.messages[0])
    names = [each.name for each in services.list_services_response.service]
    assert "peercred.v1.PeerCredentials" in names


@pytest.mark.parametrize("role", ROLES)
def test_listed_is_what_one_serves_and_everything_to_those_who_see_all(
    place: Place, role: str
) -> None:
    for asker in place.askers.values():
        asker(caller.call, TCP, f"{API}/WhoAmI", b"")
    reply = place.askers[role](caller.call, TCP, f"{API}/ListConnections", b"")

    listed = [
        connection
        for message in reply.messages
        for connection in pb.ListConnectionsResponse.FromString(message).connections
    ]
    cookies = [connection.server_socket_cookie for connection in listed]
    if role in (ROOT, MEMBER):
        # Theirs are among them: the connections to the daemon.
        assert place.server_end.socket_cookie in cookies
        assert len(cookies) > len(place.askers) - 2
    elif role == LISTENER:
        (only,) = listed
        assert only.server_socket_cookie == place.server_end.socket_cookie
        assert (only.client.uid, only.listener.uid) == (ALICE, SERVICE)
        assert only.listener.HasField("comm")
    else:
        assert reply == Reply("OK", "", b"", [])


@pytest.mark.parametrize("role", [ROOT, LISTENER, CLIENT, STRANGER])
def test_watched_is_what_one_serves_and_everything_by_those_who_see_all(
    place: Place, role: str
) -> None:
    watcher = place.actor({ROOT: 0, LISTENER: SERVICE, CLIENT: ALICE, STRANGER: BOB}[role])
    present = watcher(caller.begin_watching, f"127.0.0.1:{PORT}")
    served = place.server_end.socket_cookie
    if role == ROOT:
        assert served in present
    else:
        assert present == ([served] if role == LISTENER else [])

    # One of others', and then one of the watcher's own.
    cookies = []
    for uid in (DAVE, {ROOT: 0, LISTENER: SERVICE, CLIENT: ALICE, STRANGER: BOB}[role]):
        server = place.actor(uid)
        listening = server(steps.bind, V4, 0, ())
        server(steps.listen, listening)
        ends = place.client(steps.sockets, V4, None, ())
        place.client(steps.connect, ends, server(steps.addresses, listening, V4))
        accepted = server(steps.accept, listening)
        cookies.append(place.key(server, accepted).socket_cookie)
        place.client(steps.close, ends)
        server(steps.close, accepted)
    others, own = cookies
    told = [watcher(caller.next_watched)]
    while ("retired", own) not in told:
        told.append(watcher(caller.next_watched))

    assert ("established", own) in told
    assert (("established", others) in told) == (role == ROOT)
    if role != ROOT:
        assert {cookie for _, cookie in told} == {own}


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda each: each.method)
def test_no_connection_of_others_can_be_told_from_one_that_does_not_exist(
    place: Place, question: Question
) -> None:
    there, client = place.server_end, place.client_end
    gone = place.actor(CAROL)
    listening = gone(steps.bind, V4, 0, ())
    gone(steps.listen, listening)
    ends = gone(steps.sockets, V4, None, ())
    gone(steps.connect, ends, gone(steps.addresses, listening, V4))
    accepted = gone(steps.accept, listening)
    with gone.borrow(accepted.tcp) as sock:
        retired = _wire.key_of_socket(sock)
    gone.exit()
    disagreeing = pb.ConnectionKey(
        socket_cookie=there.socket_cookie, local=retired.local, remote=retired.remote
    )
    nowhere = pb.Endpoint(address="127.0.0.1", port=1)
    asked = [
        pb.ConnectionKey(socket_cookie=ABSENT),
        pb.ConnectionKey(socket_cookie=there.socket_cookie),
        pb.ConnectionKey(socket_cookie=client.socket_cookie),
        there,
        client,
        disagreeing,
        pb.ConnectionKey(socket_cookie=there.socket_cookie, netns_cookie=1),
        pb.ConnectionKey(local=nowhere, remote=nowhere),
        pb.ConnectionKey(local=there.local, remote=there.remote),
        pb.ConnectionKey(local=client.local, remote=client.remote),
        pb.ConnectionKey(socket_cookie=retired.socket_cookie),
        pb.ConnectionKey(local=retired.local, remote=retired.remote),
    ]
    assert place.lookup(ROOT, disagreeing).code == "INVALID_ARGUMENT"
    assert "closed since" in place.lookup(ROOT, asked[-2]).text

    answers = [question.ask(place.askers[STRANGER], key) for key in asked]

    assert answers == [answers[0]] * len(asked)
    assert isinstance(answers[0], Status)
    assert answers[0].code == code_pb2.NOT_FOUND
    if question.method == "Lookup":
        replies = [place.lookup(STRANGER, key) for key in asked]
        assert replies == [replies[0]] * len(asked)


def test_an_address_of_another_host_is_no_secret_and_betrays_no_cookie(place: Place) -> None:
    away = pb.Endpoint(address="192.0.2.1", port=80)
    local = place.server_end.local
    replies = [
        place.lookup(
            STRANGER, pb.ConnectionKey(socket_cookie=cookie, local=local, remote=away, **netns)
        )
        for cookie in (ABSENT, place.server_end.socket_cookie)
        for netns in ({"netns_cookie": place.server_end.netns_cookie},)
    ]

    assert replies[0] == replies[1]
    assert "not an address of this host" in replies[0].text


def test_as_much_is_looked_up_for_what_is_forbidden_as_for_what_is_not_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[bool] = []
    lookup = Map.lookup

    def counted(self: Map, key: bytes) -> bytes | None:
        value = lookup(self, key)
        outcomes.append(value is not None)
        return value

    with closing(Store(place.daemon.pin_dir)) as store:
        view = OwnView(
            store,
            Caller(BOB, place.server_end.socket_cookie),
            Refusals(),
            listener_details=False,
        )
        monkeypatch.setattr(Map, "lookup", counted)
        netns = place.server_end.netns_cookie
        taken = []
        for key in (place.server_end, place.client_end):
            endpoints = key_parser.parse(key).endpoints
            assert endpoints
            for sought, ends in (
                (key.socket_cookie, None),
                (ABSENT, None),
                (0, (netns, *endpoints)),
                (0, (netns + 1000, *endpoints)),
            ):
                outcomes.clear()
                found = view.find_by_tuple(*ends) if ends else view.find_by_socket(sought)
                assert found is Reason.NOT_VISIBLE
                taken.append((outcomes.count(True), outcomes.count(False)))

    assert len(set(taken)) == 1, taken


def test_who_sees_only_its_own_is_told_nothing_of_others_by_the_status(place: Place) -> None:
    reply = place.askers[STRANGER](caller.call, TCP, f"{API}/GetStatus", b"")
    told = pb.GetStatusResponse.FromString(reply.messages[0])
    whole = place.status()

    assert told.scope == pb.SCOPE_OWN
    assert not any((told.tables, told.drops, told.so_peercred, told.refusals, told.cgroup))
    assert not any(each.HasField("run_count") for each in told.attachments)
    assert told.daemon_pid == place.daemon.process.pid
    assert whole.scope == pb.SCOPE_ALL
    assert whole.tables
    assert whole.cgroup


def test_a_refusal_is_counted_and_an_absence_is_not(place: Place) -> None:
    before = place.refused("NOT_VISIBLE")
    place.lookup(STRANGER, place.server_end)
    place.lookup(STRANGER, pb.ConnectionKey(socket_cookie=ABSENT))

    assert place.refused("NOT_VISIBLE") == before + 1


@pytest.mark.parametrize("address", [TCP, TCP_V6])
@pytest.mark.parametrize("role", ROLES)
def test_each_caller_is_told_for_whom_it_is_taken_and_why(
    place: Place, role: str, address: str
) -> None:
    asker = place.askers[role]
    told = pb.WhoAmIResponse.FromString(
        asker(caller.call, address, f"{API}/WhoAmI", b"").messages[0]
    )

    expected = {
        ROOT: (0, pb.SCOPE_ALL, "you are root"),
        MEMBER: (DAVE, pb.SCOPE_ALL, f"you are in the group {STAFF} of access.groups"),
        LISTENER: (SERVICE, pb.SCOPE_OWN, "neither root nor in a group"),
        CLIENT: (ALICE, pb.SCOPE_OWN, "neither root nor in a group"),
        STRANGER: (BOB, pb.SCOPE_OWN, "neither root nor in a group"),
    }[role]
    assert told.transport == pb.TRANSPORT_LOOPBACK_TCP
    assert (told.caller.uid, told.scope) == expected[:2]
    assert expected[2] in told.reason
    assert told.caller.pid == asker.pid


def test_members_of_the_services_own_group_see_all(place: Place) -> None:
    member = place.actor(BOB, groups=(0,))  # the daemon runs with --group root
    reply = member(caller.call, TCP, f"{API}/WhoAmI", b"")

    assert pb.WhoAmIResponse.FromString(reply.messages[0]).scope == pb.SCOPE_ALL


def test_in_a_group_that_is_not_recorded_one_is_no_member(place: Place) -> None:
    # The kernel sorts them: STAFF is the 33rd.
    crowded = place.actor(BOB, groups=(*range(50001, 50033), STAFF))
    nearly = place.actor(BOB, groups=(*range(50001, 50032), STAFF))
    scopes = [
        pb.WhoAmIResponse.FromString(
            actor(caller.call, TCP, f"{API}/WhoAmI", b"").messages[0]
        ).scope
        for actor in (crowded, nearly)
    ]

    assert scopes == [pb.SCOPE_OWN, pb.SCOPE_ALL]


def test_a_caller_is_who_connected_whatever_it_becomes(place: Place) -> None:
    before = place.actor(0)
    before(caller.call, TCP, f"{API}/WhoAmI", b"")
    before(steps.become, BOB)
    asked = pb.LookupRequest(key=place.server_end).SerializeToString()

    assert before(caller.call, TCP, f"{API}/Lookup", asked).code == "OK"


@pytest.mark.parametrize("role", [ROOT, STRANGER, UNKNOWN])
def test_whoever_takes_the_port_of_a_caller_is_not_taken_for_that_one(
    place: Place, role: str
) -> None:
    before = place.actor(ALICE)
    before(caller.call, TCP, f"{API}/WhoAmI", b"")
    port = before(caller.reset_connection, PORT)
    uid = {ROOT: 0, STRANGER: BOB, UNKNOWN: ALICE}[role]
    taking = place.outsider(uid) if role == UNKNOWN else place.actor(uid)

    with place.sole_port(port):
        reply = taking(caller.call, TCP, f"{API}/WhoAmI", b"")

    assert taking(caller.reset_connection, PORT) == port
    if role == UNKNOWN:
        assert (reply.code, reply.messages) == ("UNAUTHENTICATED", [])
    else:
        assert pb.WhoAmIResponse.FromString(reply.messages[0]).caller.uid == uid


def test_namespaces_of_others_are_not_told_from_those_that_do_not_exist(place: Place) -> None:
    own = Path(f"/proc/{place.server.pid}/ns/pid").stat().st_ino
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as container:
        assert container.stdin
        assert container.stdout
        container.stdin.write(b"x\n")
        container.stdin.flush()
        container.stdout.readline()
        theirs = Path(f"/proc/{container.pid}/ns/user").stat().st_ino

        def ask(role: str, **namespaces: int) -> Reply:
            request = pb.LookupRequest(key=place.server_end, namespaces=pb.Namespaces(**namespaces))
            return place.askers[role](
                caller.call, TCP, f"{API}/Lookup", request.SerializeToString()
            )

        assert ask(ROOT, user_namespace=theirs).code == "OK"
        forbidden = ask(LISTENER, user_namespace=theirs)
        absent = ask(LISTENER, user_namespace=1)
        assert ask(LISTENER, pid_namespace=own).code == "OK"
        container.stdin.close()

    assert forbidden.code == absent.code == "INVALID_ARGUMENT"
    assert forbidden.text.replace(str(theirs), "1") == absent.text


def test_one_user_has_so_many_calls_under_way_and_takes_none_from_others(place: Place) -> None:
    greedy = place.actor(CAROL)
    watch = "/grpc.health.v1.Health/Watch"
    codes = greedy(caller.open_calls, TCP, watch, 65, b"")

    assert codes == ["OK"] * 64 + ["RESOURCE_EXHAUSTED"]
    assert place.lookup(LISTENER, place.server_end).code == "OK"
    assert place.lookup(ROOT, place.server_end).code == "OK"
    greedy(caller.cancel_calls)
    wait_for("OK", greedy, "WhoAmI")


def test_calls_that_never_send_their_message_count_too_but_for_the_first_few(place: Place) -> None:
    greedy = place.actor(CAROL)
    greedy(caller.begin_calls, TCP, f"{API}/Lookup", MAX_CALLS_UNSEEN + MAX_CALLS_PER_USER)
    before = place.refused("TOO_MANY_CALLS")
    wait_for("RESOURCE_EXHAUSTED", greedy, "WhoAmI")

    assert place.refused("TOO_MANY_CALLS") > before
    assert place.lookup(LISTENER, place.server_end).code == "OK"
    greedy.exit()


@pytest.mark.parametrize("method", ["WhoAmI", "BatchLookup", "LookupStream"])
def test_calls_whose_answers_are_not_taken_stay_under_way(place: Place, method: str) -> None:
    greedy = place.actor(CAROL)
    before = place.refused("TOO_MANY_CALLS")
    connections, refused = 20, 20 * STREAMS - MAX_CALLS_PER_USER
    assert connections * STREAMS > MAX_CONCURRENT_TCP_CALLS

    greedy(caller.call_and_take_no_answer, ADDRESS, method, connections, STREAMS, refused)

    assert place.refused("TOO_MANY_CALLS") > before
    assert place.lookup(LISTENER, place.server_end).code == "OK"
    greedy.exit()
    wait_for("OK", place.actor(CAROL), "WhoAmI")


def test_one_user_lists_so_many_times_at_once(place: Place) -> None:
    greedy = place.actor(CAROL)
    # A list that is not read waits with its first page; of an own connection there is one. It
    # takes a moment to be known that the calls before are over: until then one more is refused.
    give_up = time.monotonic() + patient(30)
    while greedy(caller.call, TCP, f"{API}/ListConnections", b"").code != "RESOURCE_EXHAUSTED":
        assert time.monotonic() < give_up
        greedy(caller.begin_calls, TCP, f"{API}/ListConnections", 1)

    assert greedy(caller.call, TCP, f"{API}/WhoAmI", b"").code == "OK"
    greedy.exit()


def test_thousands_of_connections_of_one_user_keep_nobody_out_and_most_are_closed(
    place: Place,
) -> None:
    greedy = place.actor(CAROL)
    before = place.refused("TOO_MANY_CONNECTIONS")
    greedy(caller.connect_often, PORT, 1900)

    newcomer = place.actor(ALICE)
    assert newcomer(caller.call, TCP, f"{API}/WhoAmI", b"").code == "OK"
    # On a slow machine some have been idle for too long before they are found to be too many.
    surplus = greedy(caller.wait_until_closed, 64)
    assert surplus
    give_up = time.monotonic() + patient(30)
    while place.refused("TOO_MANY_CONNECTIONS") < before + surplus:
        assert time.monotonic() < give_up
    assert place.lookup(LISTENER, place.server_end).code == "OK"
    greedy.exit()


def test_without_an_address_the_library_asks_over_tcp_where_there_is_no_socket(
    place: Place,
) -> None:
    asker = place.actor(SERVICE)
    cookie = place.server_end.socket_cookie
    peer = asker(caller.ask, None, "lookup_cookie", cookie)
    access = asker(caller.ask, None, "access")

    assert asker(caller.address_of_client) == "127.0.0.1:338"
    assert peer.uid == ALICE
    assert (access.caller.uid, access.scope.value) == (SERVICE, "own")
    stranger = place.actor(BOB)
    assert stranger(caller.ask, None, "lookup_cookie", cookie)[0] == "NotFound"


def test_the_library_believes_no_daemon_of_another_user(place: Place) -> None:
    liar, asker = place.actor(BOB), place.actor(ALICE)
    port = liar(caller.serve_as_the_daemon, "127.0.0.1:0")
    for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::ffff:127.0.0.1]:{port}"):
        error, text = asker(caller.ask, address, "status")
        assert error == "Refused"
        assert f"uid {BOB}" in text
    honest = place.actor(0)
    port = honest(caller.serve_as_the_daemon, "127.0.0.1:0")

    assert asker(caller.ask, f"127.0.0.1:{port}", "status") == ("NotFound", "a lie")


def test_a_port_that_is_taken_is_not_shared_and_is_said_in_one_line(
    place: Place, cgroup: Cgroup, hook_set: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        Daemon(cgroup, hook_set, tcp_port=PORT, namespace=place.namespace)

    assert f"127.0.0.1:{PORT}: in use by another process" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_user_that_does_not_exist_keeps_the_daemon_from_starting(
    cgroup: Cgroup, hook_set: str
) -> None:
    pin_dir = Path(f"/sys/fs/bpf/peercredd-test-{uuid4().hex[:12]}")
    with pytest.raises(RuntimeError) as caught:
        Daemon(cgroup, hook_set, "--access-user", "no-such-user", pin_dir=pin_dir)

    assert "access.users: there is no user 'no-such-user'; create it" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not pin_dir.exists()


def test_nobody_can_share_the_port_not_even_root(place: Place) -> None:
    sharing = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for route in (V4, V6):
        with pytest.raises(OSError, match="Address already in use"):
            place.askers[ROOT](steps.bind, route, PORT, (sharing,))


def test_a_daemon_that_does_not_see_its_own_callers_says_so_and_answers_nobody(
    cgroup: Cgroup, hook_set: str
) -> None:
    outside = "--tcp", "--tcp-port", str(PORT)  # of the captured cgroup, where the tests are
    with ExitStack() as undo:
        namespace = undo.enter_context(NetworkNamespace())
        daemon = undo.enter_context(Daemon(cgroup, hook_set, *outside, namespace=namespace))
        asker = undo.enter_context(closing(undo.enter_context(Origin(cgroup)).actor()))
        asker(steps.enter_network_namespace, Descriptor(namespace.fd))
        asker(caller.prepare, [str(PROJECT), str(PROJECT / "clients"), *sys.path])
        reply = asker(caller.call, TCP, f"{API}/GetStatus", b"")
        log = daemon.log()

    assert reply.code == "UNAUTHENTICATED"
    assert "start it within the captured cgroup" in log


def test_a_host_without_ipv6_is_served_over_ipv4(cgroup: Cgroup, hook_set: str) -> None:
    with NetworkNamespace() as namespace:
        namespace.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        with Daemon(cgroup, hook_set, tcp_port=PORT, namespace=namespace) as daemon:
            assert "no such address" in daemon.log()
