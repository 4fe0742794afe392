from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import peercred
from harness.blocking_twin import BlockingTwin
from harness.canned_daemon import CannedDaemon
from peercred import Client, DeadlineExceeded, InvalidArgument, PeerCredError, Unavailable

OTHER_USER = 65534
START = "`sudo peercredd` or `systemctl start peercredd`"


@pytest.fixture(params=[Client, BlockingTwin], ids=["Client", "AsyncClient"])
def kind(request: pytest.FixtureRequest) -> type[Client]:
    made: type[Client] = request.param
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can search, with a path of few bytes."""
    made = Path(tempfile.mkdtemp(prefix="peercred-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def bind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    return sock


def test_a_missing_socket_is_told_from_a_stale_one_and_both_say_how_to_start_the_daemon(
    kind: type[Client], folder: Path
) -> None:
    missing, stale = folder / "missing.sock", folder / "stale.sock"
    bind(stale).close()

    for path, complaint in ((missing, "no such socket"), (stale, "nobody listens")):
        with kind(f"unix:{path}") as client, pytest.raises(Unavailable) as caught:
            client.status()
        text = str(caught.value)
        assert f"unix:{path}" in text
        assert complaint in text
        assert START in text
        assert "\n" not in text


@pytest.mark.parametrize("method", ["lookup_many", "connections"])
def test_every_method_says_that_no_daemon_answers(
    kind: type[Client], folder: Path, method: str
) -> None:
    arguments = [[(("127.0.0.1", 1), ("127.0.0.1", 2))]] if method == "lookup_many" else []
    with (
        kind(f"unix:{folder}/missing.sock") as client,
        pytest.raises(Unavailable, match="no such socket"),
    ):
        list(getattr(client, method)(*arguments))


def test_a_tcp_address_where_nobody_listens_is_named(kind: type[Client]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with kind(address) as client, pytest.raises(Unavailable, match=START) as caught:
            client.status()

    assert f"at {address}" in str(caught.value)
    assert "refused" in str(caught.value)


@pytest.mark.parametrize("twin", ["Client", "AsyncClient"])
@pytest.mark.parametrize("forbidden", ["socket", "folder"])
def test_who_may_not_open_the_socket_is_told_which_group_to_join(
    folder: Path, twin: str, forbidden: str
) -> None:
    path = folder / "peercredd.sock"
    with CannedDaemon(f"unix:{path}"):
        (path if forbidden == "socket" else folder).chmod(0)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"""
import asyncio, os, peercred

def become_other_user():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid({OTHER_USER}, {OTHER_USER}, {OTHER_USER})
        os.setresuid({OTHER_USER}, {OTHER_USER}, {OTHER_USER})

# The client comes first: making it imports what the other user may not read.
def ask():
    with peercred.Client("unix:{path}") as client:
        become_other_user()
        client.status()

async def ask_async():
    async with peercred.AsyncClient("unix:{path}") as client:
        become_other_user()
        await client.status()

try:
    ask() if "{twin}" == "Client" else asyncio.run(ask_async())
except peercred.PeerCredError as error:
    print(type(error).__name__, error)
""",
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        folder.chmod(0o755)

    assert done.stdout.startswith("Refused ")
    assert f"unix:{path}" in done.stdout
    assert "join the group peercredd" in done.stdout


def test_a_daemon_that_does_not_answer_exceeds_the_deadline(
    kind: type[Client], folder: Path
) -> None:
    path = folder / "mute.sock"
    with (
        bind(path) as listener,
        kind(f"unix:{path}", timeout=0.2) as client,
    ):
        listener.listen()
        with pytest.raises(DeadlineExceeded, match=rf"unix:{path} did not answer within 0\.2 s"):
            client.status()


def test_a_daemon_that_breaks_off_a_call_is_unavailable(kind: type[Client], folder: Path) -> None:
    path = folder / "rude.sock"

    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.recv(1)
        listener.close()
        connection.close()

    with bind(path) as listener, kind(f"unix:{path}") as client:
        listener.listen()
        rude = threading.Thread(target=hang_up)
        rude.start()
        with pytest.raises(Unavailable, match=f"unix:{path}"):
            client.status()
        rude.join()


def test_a_daemon_with_all_its_connections_taken_is_not_said_to_be_down(
    kind: type[Client], folder: Path
) -> None:
    path = folder / "full.sock"
    done = threading.Event()

    def turn_away() -> None:
        while not done.is_set():
            listener.accept()[0].close()

    with bind(path) as listener, kind(f"unix:{path}") as client:
        listener.listen()
        turning_away = threading.Thread(target=turn_away)
        turning_away.start()
        with pytest.raises(Unavailable) as caught:
            client.status()
        done.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(os.fspath(path))
        turning_away.join()

    assert str(caught.value) == (
        f"the daemon at unix:{path} has as many connections as it takes; ask again"
    )


def test_one_client_outlives_a_restart_of_the_daemon(kind: type[Client], folder: Path) -> None:
    address = f"unix:{folder}/peercredd.sock"
    with kind(address) as client:
        with pytest.raises(Unavailable):
            client.status()
        for _ in range(2):
            with CannedDaemon(address):
                give_up = time.monotonic() + 60
                while True:
                    try:
                        client.status()
                        break
                    except Unavailable:
                        assert time.monotonic() < give_up
            with pytest.raises(Unavailable):
                client.status()


def test_a_closed_client_says_so(kind: type[Client], folder: Path) -> None:
    with CannedDaemon(f"unix:{folder}/s"):
        client = kind(f"unix:{folder}/s")
        with client:
            client.status()
            client.close()
            for call in (client.status, lambda: list(client.connections())):
                with pytest.raises(PeerCredError, match="client is closed"):
                    call()


def test_a_call_under_way_in_another_thread_fails_when_the_client_is_closed(folder: Path) -> None:
    with CannedDaemon(f"unix:{folder}/s") as canned, Client(canned.address) as client:
        canned.release.clear()
        errors: list[PeerCredError] = []

        def ask() -> None:
            try:
                client.lookup_cookie(1)
            except PeerCredError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert canned.waiting.wait(60)
        client.close()
        asking.join()

    assert "closed during the call" in str(errors[0])


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_both_ways_to_write_a_path_are_understood(
    kind: type[Client], folder: Path, form: str
) -> None:
    with (
        CannedDaemon(f"unix:{folder}/s"),
        kind(form.format(f"{folder}/s")) as client,
    ):
        client.status()
    with (
        kind(form.format(f"{folder}/missing%20one")) as client,
        pytest.raises(Unavailable, match="no such socket"),
    ):
        client.status()


def test_the_environment_names_the_daemon_and_an_argument_overrides_it(
    kind: type[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEERCRED_ADDRESS", raising=False)
    with kind() as client:
        assert client.address == "unix:/run/peercredd/peercredd.sock"
    monkeypatch.setenv("PEERCRED_ADDRESS", "unix:/environment")
    with kind() as client:
        assert client.address == "unix:/environment"
    with kind("unix:/argument") as client:
        assert client.address == "unix:/argument"


@pytest.mark.parametrize(
    ("address", "mend"),
    [
        ("", "is empty; give a gRPC address such as unix:/run"),
        ("/run/peercredd.sock", "write unix:/run/peercredd.sock"),
        ("unix:", "write unix:/path"),
        ("unix://run/peercredd.sock", "write unix:/path"),
        ("unix:/" + "a" * 107, "at most 107 bytes"),
        ("garbage", "is no address; write unix:/path or HOST:PORT"),
        ("localhost:http", "write unix:/path or HOST:PORT"),
    ],
)
@pytest.mark.parametrize("source", ["address", "PEERCRED_ADDRESS"])
def test_an_address_that_cannot_be_is_refused_with_what_to_write(
    kind: type[Client], monkeypatch: pytest.MonkeyPatch, source: str, address: str, mend: str
) -> None:
    given: str | None = address
    if source == "PEERCRED_ADDRESS":
        monkeypatch.setenv(source, address)
        given = None

    with pytest.raises(InvalidArgument, match=mend) as caught:
        kind(given)

    assert caught.value.field == source
    assert str(caught.value).startswith(source)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300])
def test_a_timeout_that_cannot_be_waited_for_is_refused(kind: type[Client], timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout") as caught:
        kind("unix:/x", timeout=timeout)

    assert caught.value.field == "timeout"


def test_no_http_proxy_is_asked_for_the_daemon(
    kind: type[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("grpc_proxy", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        with (
            CannedDaemon("127.0.0.1:0") as canned,
            kind(f"127.0.0.1:{canned.port}", timeout=2) as client,
        ):
            client.status()
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_the_host_that_a_server_on_a_unix_socket_sees_is_no_path(
    kind: type[Client], folder: Path
) -> None:
    path = folder / "raw.sock"
    received = bytearray()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS, without which no call is sent
            while b"grpc-timeout" not in received:
                received.extend(connection.recv(4096))

    with bind(path) as listener, kind(f"unix:{path}") as client:
        listener.listen()
        serving = threading.Thread(target=serve)
        serving.start()
        with pytest.raises(Unavailable):
            client.status()
        serving.join()

    assert b":authority\tlocalhost" in received


def test_making_a_client_connects_to_nothing(kind: type[Client], folder: Path) -> None:
    path = folder / "quiet.sock"
    with bind(path) as listener:
        listener.listen()
        listener.setblocking(False)
        with kind(f"unix:{path}"), pytest.raises(BlockingIOError):
            listener.accept()


def test_the_exceptions_tell_a_dead_daemon_from_one_that_refuses() -> None:
    assert issubclass(DeadlineExceeded, Unavailable)
    assert not issubclass(peercred.Refused, Unavailable)
    assert not issubclass(peercred.NotFound, Unavailable)
