from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.rpc import code_pb2

from harness.blocking_twin import BlockingTwin
from harness.canned_daemon import CannedDaemon, failure, found
from peercred import Client, InvalidArgument, Namespaces, PeerCredentials, PeerCredError
from peercred.v1 import peer_credentials_pb2 as pb

HERE = ("127.0.0.1", 8080)
CONTAINER = Namespaces(pid=4026532001, user=4026532002)
IN_MESSAGE = pb.Namespaces(pid_namespace=4026532001, user_namespace=4026532002)


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/peercredd.sock") as canned:
        yield canned


@pytest.fixture(params=[Client, BlockingTwin], ids=["Client", "AsyncClient"])
def client(request: pytest.FixtureRequest, canned: CannedDaemon) -> Iterator[Client]:
    with request.param(canned.address) as client:
        yield client


def in_container() -> pb.LookupResponse:
    answer = found()
    answer.namespaces.CopyFrom(IN_MESSAGE)
    return answer


def test_every_lookup_names_the_namespaces_it_was_given(
    canned: CannedDaemon, client: Client
) -> None:
    canned.answer = in_container()

    answers = [
        client.lookup_cookie(1, namespaces=CONTAINER),
        client.lookup_tuple(HERE, HERE, namespaces=CONTAINER),
        *client.lookup_many([(HERE, HERE)], namespaces=CONTAINER),
    ]

    assert canned.namespaces == [IN_MESSAGE] * 3
    assert all(isinstance(answer, PeerCredentials) for answer in answers)
    assert {answer.namespaces for answer in answers if isinstance(answer, PeerCredentials)} == {
        CONTAINER
    }


def test_without_any_none_are_named_and_the_answer_tells_which_it_is_about(
    canned: CannedDaemon, client: Client
) -> None:
    assert client.lookup_cookie(1).namespaces == Namespaces(pid=4026531836, user=4026531837)
    assert canned.namespaces == [pb.Namespaces()]


def test_each_batch_names_them(canned: CannedDaemon, client: Client) -> None:
    canned.answer = in_container()

    client.lookup_many([(HERE, HERE)] * 1001, namespaces=Namespaces(user=CONTAINER.user))

    only_user = pb.Namespaces(user_namespace=4026532002)
    assert canned.namespaces == [only_user, only_user]


@pytest.mark.parametrize(
    "answered",
    [
        pb.Namespaces(pid_namespace=4026531836, user_namespace=4026532002),
        pb.Namespaces(pid_namespace=4026532001, user_namespace=4026531837),
        pb.Namespaces(pid_namespace=4026532001),
        pb.Namespaces(),
    ],
)
def test_an_answer_in_other_numbers_than_those_asked_for_is_an_error(
    canned: CannedDaemon, client: Client, answered: pb.Namespaces
) -> None:
    answer = found()
    answer.namespaces.CopyFrom(answered)
    canned.answer = answer

    with pytest.raises(PeerCredError, match="upgrade the daemon"):
        client.lookup_cookie(1, namespaces=CONTAINER)
    (in_batch,) = client.lookup_many([(HERE, HERE)], namespaces=CONTAINER)
    assert type(in_batch) is PeerCredError


def test_an_answer_that_does_not_say_whose_numbers_it_has_is_an_error(
    canned: CannedDaemon, client: Client
) -> None:
    answer = found()
    answer.ClearField("namespaces")
    canned.answer = answer

    with pytest.raises(PeerCredError, match="does not say whose numbers it has"):
        client.lookup_cookie(1)


@pytest.mark.parametrize("number", [-1, 2**32])
@pytest.mark.parametrize("name", ["pid", "user"])
def test_a_number_that_no_namespace_can_have_is_not_sent(
    canned: CannedDaemon, client: Client, name: str, number: int
) -> None:
    asked = Namespaces(**{name: number})

    for ask in (
        lambda: client.lookup_cookie(1, namespaces=asked),
        lambda: client.lookup_many([(HERE, HERE)], namespaces=asked),
    ):
        with pytest.raises(InvalidArgument, match="out of range") as refused:
            ask()
        assert refused.value.field == f"namespaces.{name}"
    assert not canned.namespaces


def test_an_unknown_namespace_is_an_invalid_argument_that_names_it(
    canned: CannedDaemon, client: Client
) -> None:
    field = "namespaces.pid_namespace"
    canned.answer = failure(
        code_pb2.INVALID_ARGUMENT, "no such namespace", "NAMESPACE_UNKNOWN", field=field
    )

    with pytest.raises(InvalidArgument, match="no such namespace") as refused:
        client.lookup_cookie(1, namespaces=CONTAINER)
    assert refused.value.field == field


def test_a_processs_namespaces_are_those_of_proc() -> None:
    links = [Path(f"/proc/{os.getpid()}/ns/{kind}").readlink().name for kind in ("pid", "user")]
    own = Namespaces.own()

    assert [f"pid:[{own.pid}]", f"user:[{own.user}]"] == links
    assert Namespaces.of(os.getpid()) == own


def test_a_process_that_is_not_there_has_no_namespaces() -> None:
    with pytest.raises(InvalidArgument, match="there is no process 4194305") as refused:
        Namespaces.of(2**22 + 1)
    assert refused.value.field == "pid"
