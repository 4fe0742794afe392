from __future__ import annotations

import ctypes
import os
import pwd
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

import peercred
from harness.blocking_twin import BlockingTwin
from harness.canned_daemon import CannedDaemon
from peercred import Client, InvalidArgument, Refused, _address, _trust

OTHER_USER = 65534


@pytest.fixture(params=[Client, BlockingTwin], ids=["Client", "AsyncClient"])
def kind(request: pytest.FixtureRequest) -> type[Client]:
    made: type[Client] = request.param
    return made


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No daemon at the addresses that are tried without one; the path of the unix socket."""
    path = tmp_path / "s"
    monkeypatch.delenv("PEERCRED_ADDRESS", raising=False)
    monkeypatch.setattr(_address, "DEFAULT_ADDRESS", f"unix:{path}")
    monkeypatch.setattr(_address, "DEFAULT_TCP_ADDRESSES", ())
    return path


@pytest.fixture
def listener_of_another() -> Iterator[socket.socket]:
    """A socket that listens, made by another user; needs root."""
    with ThreadPoolExecutor(1) as thread:

        def make() -> socket.socket:
            # A thread has ids of its own: glibc's setfsuid() is for one alone.
            ctypes.CDLL(None).setfsuid(OTHER_USER)
            return socket.create_server(("127.0.0.1", 0))

        with thread.submit(make).result() as listener:
            yield listener


def test_the_unix_socket_is_taken_if_one_may_connect_to_it(
    kind: type[Client], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CannedDaemon(f"unix:{nowhere}"), CannedDaemon("127.0.0.1:0") as tcp:
        monkeypatch.setattr(_address, "DEFAULT_TCP_ADDRESSES", (f"127.0.0.1:{tcp.port}",))
        with kind() as client:
            client.access()
            assert client.address == f"unix:{nowhere}"


def test_else_loopback_tcp_is_taken_and_again_the_socket_when_it_is_there(
    kind: type[Client], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERCRED_TRUSTED_USER", str(os.geteuid()))
    with kind() as client:
        with pytest.raises(peercred.Unavailable, match="no such socket"):
            client.access()
        with CannedDaemon("127.0.0.1:0") as tcp:
            address = f"127.0.0.1:{tcp.port}"
            monkeypatch.setattr(_address, "DEFAULT_TCP_ADDRESSES", (address,))
            client.access()
            assert client.address == address
        with CannedDaemon(f"unix:{nowhere}"):
            # gRPC waits for a moment before it tries again where it failed.
            give_up = time.monotonic() + 60
            while True:
                try:
                    client.access()
                    break
                except peercred.Unavailable:
                    assert time.monotonic() < give_up
            assert client.address == f"unix:{nowhere}"


@pytest.mark.root
def test_a_port_of_another_user_is_refused_unless_that_user_is_trusted(
    kind: type[Client], listener_of_another: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener_of_another.getsockname()[1]
    with kind(f"127.0.0.1:{port}") as client, pytest.raises(Refused) as caught:
        client.status()

    text = str(caught.value)
    assert f"127.0.0.1:{port}" in text
    assert f"(uid {OTHER_USER})" in text
    assert "--trust-user" in text
    assert "\n" not in text
    listener_of_another.settimeout(0)
    with pytest.raises(BlockingIOError):  # nobody has said anything to it
        listener_of_another.accept()
    for trusted in (OTHER_USER, str(OTHER_USER)):
        with (
            kind(f"127.0.0.1:{port}", timeout=0.2, trusted_user=trusted) as client,
            pytest.raises(peercred.DeadlineExceeded),
        ):
            client.status()


@pytest.mark.root
def test_a_daemon_of_the_services_own_user_is_believed(
    kind: type[Client], listener_of_another: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trust, "SERVICE_USER", pwd.getpwuid(OTHER_USER).pw_name)
    address = f"127.0.0.1:{listener_of_another.getsockname()[1]}"
    with kind(address, timeout=0.2) as client, pytest.raises(peercred.DeadlineExceeded):
        client.status()


@pytest.mark.root
def test_a_unix_socket_of_another_user_is_refused(kind: type[Client], tmp_path: Path) -> None:
    path = tmp_path / "s"
    with CannedDaemon(f"unix:{path}"):
        os.chown(path, OTHER_USER, -1)
        with kind(f"unix:{path}") as client, pytest.raises(Refused, match=f"uid {OTHER_USER}"):
            client.status()


@pytest.mark.root
def test_a_port_that_changes_hands_during_a_call_is_refused(
    kind: type[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERCRED_TRUSTED_USER", str(os.geteuid()))
    looks = iter([{os.geteuid()}, {OTHER_USER}])
    with CannedDaemon("127.0.0.1:0") as canned, kind(f"127.0.0.1:{canned.port}") as client:
        monkeypatch.setattr(_trust, "_owners", lambda *_: next(looks))
        with pytest.raises(Refused):
            client.status()


def test_a_listener_is_found_however_it_is_bound() -> None:
    v4, v6 = ip_address("127.0.0.1"), ip_address("::1")
    for host, family, seen in (
        ("127.0.0.1", socket.AF_INET, {v4}),
        ("0.0.0.0", socket.AF_INET, {v4}),
        ("127.0.0.2", socket.AF_INET, set()),
        ("::1", socket.AF_INET6, {v6}),
        ("::", socket.AF_INET6, {v4, v6}),
        ("::ffff:127.0.0.1", socket.AF_INET6, {v4}),
    ):
        with socket.socket(socket.AF_INET6) as every, socket.socket(family) as listener:
            for each in (every, listener):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if each.family == socket.AF_INET6:
                    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # It does not listen, and keeps others from the port at every address.
            every.bind(("::", 0))
            port = every.getsockname()[1]
            listener.bind((host, port))
            assert not any(_trust.somebody_listens(each, port) for each in (v4, v6))
            listener.listen()
            assert {each for each in (v4, v6) if _trust.somebody_listens(each, port)} == seen


@pytest.mark.parametrize(
    ("address", "mend"),
    [
        ("192.0.2.1:338", "write 127.0.0.1:PORT"),
        ("example.org:338", "names are not looked up"),
        ("127.0.0.1:0", "no port of this host's loopback"),
        ("127.0.0.1:65536", "no port of this host's loopback"),
        ("::1:338", "write unix:/path or HOST:PORT"),
    ],
)
def test_a_port_whose_owner_cannot_be_known_is_no_address(
    kind: type[Client], address: str, mend: str
) -> None:
    with pytest.raises(InvalidArgument, match=mend):
        kind(address)


@pytest.mark.parametrize("source", ["trusted_user", "PEERCRED_TRUSTED_USER"])
def test_a_trusted_user_that_does_not_exist_is_an_error(
    kind: type[Client], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    user: str | None = "no-such-user"
    if source == "PEERCRED_TRUSTED_USER":
        monkeypatch.setenv(source, "no-such-user")
        user = None
    with pytest.raises(InvalidArgument, match="no user of this host") as caught:
        kind("unix:/x", trusted_user=user)

    assert caught.value.field == source
