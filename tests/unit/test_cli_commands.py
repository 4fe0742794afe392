import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from harness.canned_daemon import CannedDaemon, failure
from harness.cli import Peercred, finish
from harness.patience import patient
from peercred.v1 import peer_credentials_pb2 as pb

HOSTILE = b"\x1b]0;pwned\x07[red]\n\xff\xe2\x80\xae"
HOSTILE_ESCAPED = r"\x1b]0;pwned\x07[red]\n\xff\u202e"
LONG_ENDPOINT = "[fd00:1111:2222:3333:4444:5555:6666:7777]:50001"

LOOKUP = ("lookup", "127.0.0.1:8080", "127.0.0.1:50000")
TCP_LISTEN = "0A"  # as /proc/net/tcp writes it

SUBCOMMANDS = ("lookup", "list", "watch", "status", "whoami", "run", "doctor", "completion")


def credentials(**fields: Any) -> pb.Credentials:
    message = pb.Credentials(
        pid=4242,
        tid=4243,
        uid=0,
        gid=0,
        groups=[0, 4_000_000_001],
        group_count=2,
        comm=b"curl",
        effective_capabilities=0x1FF,
        no_new_privs=False,
        time_ns=5,
    )
    message.MergeFrom(pb.Credentials(**fields))
    return message


def found(**fields: Any) -> pb.LookupResponse:
    return pb.LookupResponse(
        peer_end=pb.END_CLIENT,
        basis=pb.BASIS_TUPLE,
        peer=credentials(**fields),
        server_socket_cookie=2**64 - 1,
        client_socket_cookie=31,
        netns_cookie=1,
        established_time_ns=6,
        namespaces=pb.Namespaces(pid_namespace=4026531836, user_namespace=4026531837),
    )


def page(*, count: int = 1, **fields: Any) -> pb.ListConnectionsResponse:
    return pb.ListConnectionsResponse(
        connections=[
            pb.Connection(
                server_socket_cookie=7000 + number,
                client_socket_cookie=31,
                netns_cookie=1,
                client_endpoint=pb.Endpoint(address=LONG_ENDPOINT[1:-7], port=50001),
                server_endpoint=pb.Endpoint(address="::1", port=8080),
                client=credentials(**fields),
            )
            for number in range(count)
        ]
    )


def status() -> pb.GetStatusResponse:
    return pb.GetStatusResponse(
        version="9.8.7",
        hook_set="cgroup",
        kernel_release="6.18.0",
        cgroup="/sys/fs/cgroup/user.slice",
        tables=[
            pb.GetStatusResponse.Table(
                name="connections", entries=12, max_entries=65536, max_entries_per_user=16384
            )
        ],
        drops=[pb.GetStatusResponse.Drop(reason="TABLE_FULL", count=3, description="no room")],
        missing_fields=["login_uid"],
        attachments=[
            pb.GetStatusResponse.Attachment(program="connect4", attached=True),
            pb.GetStatusResponse.Attachment(program="sock_ops", attached=False),
        ],
        daemon_pid=77,
        netns_cookie=1,
        unused_hook_sets=[
            pb.GetStatusResponse.UnusedHookSet(
                hook_set="trace", reason="the kernel cannot attach to tcp_connect"
            )
        ],
    )


def traced(*, missed: int) -> pb.GetStatusResponse:
    return pb.GetStatusResponse(
        hook_set="trace",
        attachments=[
            pb.GetStatusResponse.Attachment(
                program="tcp_connect", attached=True, run_count=1000, missed_count=missed
            ),
            pb.GetStatusResponse.Attachment(
                program="inet_csk_accept", attached=True, run_count=0, missed_count=0
            ),
        ],
        unused_hook_sets=[
            pb.GetStatusResponse.UnusedHookSet(
                hook_set="cgroup", reason="trace is preferred (--hooks auto)"
            )
        ],
    )


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/daemon.sock") as daemon:
        daemon.answer = found()
        daemon.pages = [page()]
        daemon.status = status()
        yield daemon


@pytest.fixture
def peercred(canned: CannedDaemon) -> Peercred:
    return Peercred(canned.address)


@pytest.fixture
def host_check(peercred: Peercred, tmp_path: Path) -> Callable[[str], None]:
    """Put a program in the place of the daemon's own, which would load BPF programs."""

    def install(program: str) -> None:
        package = tmp_path / "first" / "peercredd"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(program)
        path = os.environ.get("PYTHONPATH")
        peercred.environment["PYTHONPATH"] = f"{package.parent}{os.pathsep + path if path else ''}"

    return install


def says(outcome: str, name: str = "cgroup loadable") -> str:
    check = {"name": name, "outcome": outcome, "detail": "loaded", "mend": "", "log": ""}
    return f"print({json.dumps(json.dumps({'checks': [check]}))})"


def row(shown: str, name: str) -> str:
    """Return what stands behind `name` in the one row that begins with it."""
    (value,) = (
        line.removeprefix(name).strip()
        for line in shown.splitlines()
        if line.startswith(f"{name}  ")
    )
    return value


def only_error(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("peercred: ")
    return line


# lookup


def test_lookup_shows_who_is_at_the_other_end(peercred: Peercred) -> None:
    done = peercred(*LOOKUP)

    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    shown = {name: value.strip() for name, value in rows.items()}
    assert shown["peer"] == "client (called connect)"
    assert shown["answer rests on"] == "the tuple"
    assert shown["pid"] == "4242"
    assert shown["user"] == "0 (root)"
    assert shown["groups"] == "0 (root) 4000000001 (no name)"
    assert shown["capabilities"] == "00000000000001ff"
    assert shown["no new privileges"] == "no"


@pytest.mark.parametrize(
    ("capabilities", "shown"),
    [
        (0, "none"),
        ((1 << int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1) - 1, "all"),
        (1 << 63, "8000000000000000"),
    ],
)
def test_no_capability_and_all_of_them_are_said_in_words(
    peercred: Peercred, canned: CannedDaemon, capabilities: int, shown: str
) -> None:
    canned.answer = found(effective_capabilities=capabilities)

    (line,) = (row for row in peercred(*LOOKUP).stdout.splitlines() if row.startswith("capab"))

    assert line.split() == ["capabilities", shown]


def test_a_cookie_that_names_nothing_is_not_explained_by_addresses(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.answer = failure(code_pb2.NOT_FOUND, "nothing recorded", "NEVER_SEEN")

    by_cookie, by_tuple = peercred("lookup", "--cookie", "3"), peercred(*LOOKUP)

    assert "; the cookie is that of the asking end" in only_error(by_cookie)
    assert "LOCAL" not in by_cookie.stderr
    assert "; LOCAL is the asking end's own address" in only_error(by_tuple)


def test_a_namespace_that_is_not_the_cookies_is_named_by_its_option(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.answer = failure(
        code_pb2.INVALID_ARGUMENT, "no", "KEYS_DISAGREE", field="key.netns_cookie"
    )

    done = peercred("lookup", "--cookie", "3", "--netns-cookie", "99")

    assert done.returncode == 2
    assert only_error(done) == (
        "peercred: --netns-cookie: 99 is not the network namespace of the socket that --cookie "
        "names; leave it out"
    )


def test_what_the_kernel_does_not_tell_is_shown_as_unknown(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.answer = pb.LookupResponse(
        peer_end=pb.END_SERVER,
        basis=pb.BASIS_SOCKET,
        peer=pb.Credentials(pid=1, uid=0, gid=0),
        namespaces=pb.Namespaces(pid_namespace=1, user_namespace=2),
    )

    human, document = peercred(*LOOKUP).stdout, json.loads(peercred(*LOOKUP, "--json").stdout)

    for row in ("thread", "groups", "login user", "capabilities", "command", "process started"):
        (line,) = (line for line in human.splitlines() if line.startswith(row))
        assert line.split()[-1] == "unknown"
    for field in ("tid", "group_count", "login_uid", "effective_capabilities", "comm", "time_ns"):
        assert document[field] is None


def test_lookup_shows_who_accepted_in_rows_that_cannot_be_taken_for_the_answers(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    before = peercred(*LOOKUP).stdout
    answer = found()
    answer.acceptor.CopyFrom(credentials(pid=81, uid=4_000_000_001, gid=0, comm=b"worker"))
    canned.answer = answer

    after = peercred(*LOOKUP).stdout

    assert row(before, "accepted by") == "unknown"
    assert row(after, "accepted by") == "user 4000000001 (no name), group 0 (root)"
    assert row(after, "acceptor's pid") == "81"
    assert row(after, "acceptor's command") == "worker"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+", row(after, "accepted"))
    for name in ("peer", "command", "pid", "user", "group"):
        assert row(after, name) == row(before, name)


def test_lookup_as_json_has_the_acceptor_as_an_object_of_its_own_or_null(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    before = json.loads(peercred(*LOOKUP, "--json").stdout)
    answer = found()
    answer.acceptor.CopyFrom(credentials(pid=81, uid=4_000_000_001, gid=0, comm=b"worker"))
    canned.answer = answer

    after = json.loads(peercred(*LOOKUP, "--json").stdout)

    assert before["acceptor"] is None
    acceptor = after.pop("acceptor")
    assert {"acceptor": None, **after} == before
    assert (acceptor["pid"], acceptor["uid"], acceptor["uid_name"]) == (81, 4_000_000_001, None)
    assert (acceptor["gid_name"], acceptor["comm"], acceptor["tid"]) == ("root", "worker", 4243)


def test_lookup_as_json_is_one_object_with_names_beside_the_numbers(peercred: Peercred) -> None:
    done = peercred(*LOOKUP, "--json")

    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert (document["uid"], document["uid_name"]) == (0, "root")
    assert (document["gid"], document["gid_name"]) == (0, "root")
    assert (document["pid"], document["comm"], document["basis"]) == (4242, "curl", "tuple")
    assert document["groups"] == [0, 4_000_000_001]
    assert document["server_socket_cookie"] == 2**64 - 1


@pytest.mark.parametrize(
    ("uid", "gid", "uid_name", "gid_name"),
    [(4_000_000_001, 0, None, "root"), (0, 4_000_000_002, "root", None)],
)
def test_an_id_without_a_name_has_none_in_json(
    peercred: Peercred,
    canned: CannedDaemon,
    uid: int,
    gid: int,
    uid_name: str | None,
    gid_name: str | None,
) -> None:
    canned.answer = found(uid=uid, gid=gid)

    document = json.loads(peercred(*LOOKUP, "--json").stdout)

    assert (document["uid"], document["uid_name"]) == (uid, uid_name)
    assert (document["gid"], document["gid_name"]) == (gid, gid_name)


@pytest.mark.parametrize(
    ("local", "remote", "asked"),
    [
        ("127.0.0.1:8080", "127.0.0.1:50000", ("127.0.0.1", 8080, "127.0.0.1", 50000)),
        ("[::1]:1", "[::1]:65535", ("::1", 1, "::1", 65535)),
        ("[::ffff:127.0.0.1]:80", "127.0.0.1:81", ("127.0.0.1", 80, "127.0.0.1", 81)),
        ("[0:0:0:0:0:0:0:1]:80", "[fe80::1%lo]:81", ("::1", 80, "fe80::1%lo", 81)),
    ],
)
def test_lookup_asks_for_the_endpoints_it_was_given(
    peercred: Peercred,
    canned: CannedDaemon,
    local: str,
    remote: str,
    asked: tuple[str, int, str, int],
) -> None:
    peercred("lookup", local, remote, "--netns-cookie", "18446744073709551615")

    (key,) = canned.keys
    assert (key.local.address, key.local.port, key.remote.address, key.remote.port) == asked
    assert key.netns_cookie == 2**64 - 1
    assert not key.HasField("socket_cookie")


def test_lookup_by_cookie_asks_for_the_cookie_alone(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    done = peercred("lookup", "--cookie", "18446744073709551615")

    (key,) = canned.keys
    assert done.returncode == 0
    assert key == pb.ConnectionKey(socket_cookie=2**64 - 1)


# list


def test_list_shows_a_line_for_each_connection(peercred: Peercred) -> None:
    done = peercred("list")

    header, line = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(zip(header.split(), line.split(), strict=True)) == {
        "CLIENT": LONG_ENDPOINT,
        "SERVER": "[::1]:8080",
        "UID": "0",
        "USER": "root",
        "PID": "4242",
        "LISTENER-UID": "unknown",
        "LISTENER-PID": "unknown",
        "NETNS-COOKIE": "1",
        "COOKIE": "7000",
        "COMMAND": "curl",
    }


def test_list_as_json_is_one_document_of_all_pages(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.pages = [page(count=2), page()]

    done = peercred("list", "--json")

    first, _, _ = json.loads(done.stdout)["connections"]
    assert done.stdout.count("\n") == 1
    assert first["client"]["uid_name"] == "root"
    assert first["listener"] is None
    assert first["acceptor"] is None
    assert first["server_endpoint"] == {"address": "::1", "port": 8080}


def test_list_as_json_names_the_acceptor_beside_both_ends(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    accepted = page(uid=4_000_000_001)
    accepted.connections[0].acceptor.CopyFrom(credentials(pid=81))
    canned.pages = [accepted]

    (listed,) = json.loads(peercred("list", "--json").stdout)["connections"]

    assert (listed["acceptor"]["pid"], listed["acceptor"]["uid_name"]) == (81, "root")
    assert listed["client"]["uid"] == 4_000_000_001
    assert listed["listener"] is None


def test_an_empty_list_is_an_answer(peercred: Peercred, canned: CannedDaemon) -> None:
    canned.pages = []

    human, machine = peercred("list"), peercred("list", "--json")

    assert human.returncode == machine.returncode == 0
    assert human.stdout.split()[0] == "CLIENT"
    assert json.loads(machine.stdout) == {"connections": []}


@pytest.mark.parametrize("user", ["root", "0"])
def test_list_hands_its_filters_to_the_daemon(
    peercred: Peercred, canned: CannedDaemon, user: str
) -> None:
    peercred("list", "--uid", user, "--port", "8080", "--netns-cookie", "3")

    assert canned.filters == [
        pb.ListConnectionsRequest(client_uid=0, server_port=8080, netns_cookie=3)
    ]


def test_without_filters_nothing_is_filtered(peercred: Peercred, canned: CannedDaemon) -> None:
    peercred("list")

    assert canned.filters == [pb.ListConnectionsRequest()]


def test_a_list_that_breaks_off_shows_no_part_of_it(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.pages = [page(), failure(code_pb2.UNAVAILABLE, "shutting down: ask again")]

    done = peercred("list")

    assert done.returncode == 3
    assert only_error(done) == "peercred: shutting down: ask again"


# status


def test_status_shows_what_is_lost_and_dropped(peercred: Peercred) -> None:
    done = peercred("status")

    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    for row in (
        ["version", "9.8.7"],
        ["captured", "cgroup", "/sys/fs/cgroup/user.slice"],
        ["missing", "fields", "login_uid"],
        ["hook", "set", "cgroup"],
        ["connect4", "yes", "-", "-"],
        ["sock_ops", "no", "-", "-"],
        ["connections", "12", "65536", "16384"],
        ["TABLE_FULL", "3", "no", "room"],
    ):
        assert row in rows


def test_status_says_why_a_hook_set_is_not_used(peercred: Peercred) -> None:
    shown = peercred("status").stdout

    assert row(shown, "hook set") == "cgroup"
    assert row(shown, "unused hook set") == "trace: the kernel cannot attach to tcp_connect"


def test_status_shows_how_often_a_program_ran_and_was_left_out(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.status = traced(missed=7)

    rows = [line.split() for line in peercred("status").stdout.splitlines()]

    assert ["PROGRAM", "ATTACHED", "RUNS", "MISSED"] in rows
    assert ["tcp_connect", "yes", "1000", "7"] in rows
    assert ["inet_csk_accept", "yes", "0", "0"] in rows


OPTED_IN = [
    pb.GetStatusResponse.SoPeercred(
        target="all", source="config", cgroup="/sys/fs/cgroup", attached=True
    ),
    pb.GetStatusResponse.SoPeercred(
        target="a.service",
        source="config",
        cgroup="/sys/fs/cgroup/system.slice/a.service",
        waiting=True,
        detail="it does not run",
    ),
    pb.GetStatusResponse.SoPeercred(
        target="/x", source="enabled", detail="/x: another program is there; ask its owner"
    ),
]


def test_status_shows_where_so_peercred_works_on_tcp_and_why_elsewhere_not(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    assert "SO_PEERCRED" not in peercred("status").stdout
    assert isinstance(canned.status, pb.GetStatusResponse)
    canned.status.so_peercred.extend(OPTED_IN)

    rows = [line.split() for line in peercred("status").stdout.splitlines()]
    document = json.loads(peercred("status", "--json").stdout)

    for row in (
        ["SO_PEERCRED", "ON", "TCP", "SOURCE", "ATTACHED", "CGROUP", "DETAIL"],
        ["all", "config", "yes", "/sys/fs/cgroup"],
        [
            *("a.service", "config", "waiting", "/sys/fs/cgroup/system.slice/a.service"),
            *("it", "does", "not", "run"),
        ],
    ):
        assert row in rows
    assert ["/x", "enabled", "no", "unknown"] in [row[:4] for row in rows]
    assert document["so_peercred"][2] == {
        "target": "/x",
        "source": "enabled",
        "cgroup": None,
        "attached": False,
        "waiting": False,
        "detail": "/x: another program is there; ask its owner",
    }


@pytest.mark.parametrize("missed", [0, 7])
def test_missed_runs_stand_out_in_a_pipe_too_where_there_are_any(
    peercred: Peercred, canned: CannedDaemon, missed: int
) -> None:
    canned.status = traced(missed=missed)

    assert ("Runs were missed" in peercred("status").stdout) == bool(missed)


def test_missed_runs_stand_out_on_a_terminal_and_none_do_not(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.status = traced(missed=7)

    shown = peercred.on_terminal("status", columns=200)

    assert "\x1b[1;31m7" in shown
    assert "\x1b[1;31m0" not in shown


def test_status_as_json_has_every_part(peercred: Peercred) -> None:
    document = json.loads(peercred("status", "--json").stdout)

    assert document["capture_start_time"] == "1970-01-01T00:00:00+00:00"
    assert document["tables"] == [
        {"name": "connections", "entries": 12, "max_entries": 65536, "max_entries_per_user": 16384}
    ]
    assert document["attachments"][1] == {
        "program": "sock_ops",
        "attached": False,
        "run_count": None,
        "missed_count": None,
    }
    assert document["unused_hook_sets"] == [
        {"hook_set": "trace", "reason": "the kernel cannot attach to tcp_connect"}
    ]
    assert document["daemon_pid"] == 77


# watch


def watched() -> list[pb.WatchConnectionsResponse]:
    """One that was there, one that comes, and the first one goes; then some are missed."""
    there, comes = page(count=2, comm=HOSTILE).connections
    gone = pb.ConnectionEvent.Retired(server_socket_cookie=there.server_socket_cookie)
    return [
        pb.WatchConnectionsResponse(events=[pb.ConnectionEvent(present=there)]),
        pb.WatchConnectionsResponse(synchronized=True),
        pb.WatchConnectionsResponse(
            events=[pb.ConnectionEvent(established=comes), pb.ConnectionEvent(retired=gone)],
        ),
        pb.WatchConnectionsResponse(missed=3),
    ]


def test_watch_prints_a_line_for_each_event_that_no_terminal_obeys(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.watched = watched()

    done = peercred("watch")

    words = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert [kind for _, _, kind, *_ in words] == [
        *("present", "synchronized", "established", "retired", "missed")
    ]
    assert words[-1][3:] == ["3"]
    assert words[0][3].startswith(f"{LONG_ENDPOINT} -> [::1]:8080 root pid 4242")
    assert words[0][3] == words[3][3]
    assert HOSTILE_ESCAPED in words[2][3]


def test_watch_as_json_is_a_document_for_each_event(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.watched = watched()

    documents = [json.loads(line) for line in peercred("watch", "--json").stdout.splitlines()]

    assert [document["event"] for document in documents[:-1]] == [
        *("present", "synchronized", "established", "retired", "missed")
    ]
    assert documents[0]["connection"]["client"]["uid_name"] == "root"
    assert documents[3]["connection"] == documents[0]["connection"]
    assert documents[4]["missed"] == 3
    assert documents[-1]["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    ("events", "head"),
    [
        (2, b"1 connections, 0 established since the start"),
        (3, b"1 connections, 1 established since the start"),
        (4, b"1 connections, 1 established since the start, 3 missed"),
    ],
    ids=["present", "one came and one went", "missed"],
)
def test_watch_shows_on_a_terminal_what_is_there(
    peercred: Peercred, canned: CannedDaemon, events: int, head: bytes
) -> None:
    canned.watched = watched()[:events]
    canned.release.clear()
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    with peercred.start("watch", output=inside) as process, ExitStack() as undo:
        undo.callback(process.kill)
        os.close(inside)
        shown, give_up = b"", time.monotonic() + patient(30)
        while head not in shown or b"root" not in shown:
            assert time.monotonic() < give_up, shown
            shown += os.read(outside, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: the other end is closed
            while part := os.read(outside, 65536):
                shown += part
        assert process.wait() == -signal.SIGINT
    os.close(outside)
    assert b"\x1b]0;pwned" not in shown
    hidden, seen = shown.rfind(b"\x1b[?25l"), shown.rfind(b"\x1b[?25h")
    assert 0 <= hidden < seen, "the cursor is there again"


# whoami


@pytest.mark.parametrize(
    ("options", "address", "table"),
    [((), "127.0.0.1", "/proc/net/tcp"), (("--ipv6",), "::1", "/proc/net/tcp6")],
)
def test_whoami_asks_about_the_server_end_of_its_own_connection(
    peercred: Peercred, canned: CannedDaemon, options: tuple[str, ...], address: str, table: str
) -> None:
    canned.release.clear()
    process = peercred.start("whoami", *options, "--json")
    assert canned.waiting.wait(60)
    sockets = [line.split() for line in Path(table).read_text().splitlines()[1:]]
    canned.release.set()
    done = finish(process)

    (key,) = canned.keys
    listening = {int(row[1].split(":")[1], 16) for row in sockets if row[3] == TCP_LISTEN}
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid"] == 4242
    assert key.HasField("socket_cookie")
    assert key.local.address == key.remote.address == address
    assert key.local.port in listening


def test_whoami_explains_why_nothing_may_be_known(peercred: Peercred, canned: CannedDaemon) -> None:
    canned.answer = failure(code_pb2.NOT_FOUND, "nothing recorded", "NEVER_SEEN")

    done = peercred("whoami")

    assert done.returncode == 1
    assert "captured cgroup, which `peercred status` names" in only_error(done)


LIMITED = pb.WhoAmIResponse(
    transport=pb.TRANSPORT_LOOPBACK_TCP,
    scope=pb.SCOPE_OWN,
    reason="you are nobody in particular",
    caller=pb.Credentials(pid=4711, uid=0, gid=0),
)


def test_whoami_shows_what_one_may_ask_and_why(peercred: Peercred, canned: CannedDaemon) -> None:
    unlimited = peercred("whoami").stdout
    canned.access = LIMITED
    limited = peercred("whoami").stdout

    assert row(unlimited, "may ask about") == "all connections"
    assert row(unlimited, "asked over") == f"unix socket ({canned.address})"
    assert "permissions" in row(unlimited, "daemon takes you for")
    assert row(limited, "may ask about") == "your own"
    assert row(limited, "because") == "you are nobody in particular"
    assert row(limited, "daemon takes you for") == "0 (root), process 4711"
    assert row(limited, "asked over").startswith("loopback TCP (")


def test_whoami_has_what_one_may_ask_in_its_document(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.access = LIMITED
    access = json.loads(peercred("whoami", "--json").stdout)["access"]

    caller = access.pop("caller")
    assert (caller["pid"], caller["uid"], caller["uid_name"]) == (4711, 0, "root")
    assert access == {
        "address": canned.address,
        "transport": "loopback TCP",
        "scope": "own",
        "reason": "you are nobody in particular",
        "listener_details": False,
    }


def test_who_sees_only_its_own_is_not_told_that_tables_are_empty(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.status = pb.GetStatusResponse(scope=pb.SCOPE_OWN)

    shown = peercred("status").stdout

    assert row(shown, "captured cgroup") == "not told to you"
    assert "not told to you" in shown
    assert "TABLE" not in shown
    checks = {
        check["name"]: check for check in json.loads(peercred("doctor", "--json").stdout)["checks"]
    }
    assert "not told to you" in checks["SO_PEERCRED on TCP"]["detail"]


def test_status_shows_what_was_refused(peercred: Peercred, canned: CannedDaemon) -> None:
    assert isinstance(canned.status, pb.GetStatusResponse)
    canned.status.refusals.add(reason="NOT_VISIBLE", count=5, description="others' connections")

    rows = [line.split() for line in peercred("status").stdout.splitlines()]

    assert ["REFUSED", "ON", "TCP", "COUNT", "MEANING"] in rows
    assert ["NOT_VISIBLE", "5", "others'", "connections"] in rows


# what a process calls itself


@pytest.mark.parametrize("arguments", [LOOKUP, ("whoami",), ("list",)])
@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_hostile_name_reaches_no_table_unescaped(
    peercred: Peercred, canned: CannedDaemon, arguments: tuple[str, ...], on_terminal: bool
) -> None:
    answer = found(comm=HOSTILE)
    answer.acceptor.CopyFrom(credentials(comm=HOSTILE))
    canned.answer = answer
    canned.pages = [page(comm=HOSTILE)]

    if on_terminal:
        shown = peercred.on_terminal(*arguments, columns=250)
    else:
        shown = peercred(*arguments).stdout
        assert shown.isascii()
        assert shown.replace("\n", "").isprintable()

    assert HOSTILE_ESCAPED in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("arguments", [LOOKUP, ("list",)])
def test_a_hostile_name_is_exact_and_inert_in_json(
    peercred: Peercred, canned: CannedDaemon, arguments: tuple[str, ...]
) -> None:
    canned.answer = found(comm=HOSTILE)
    canned.pages = [page(comm=HOSTILE)]

    shown = peercred(*arguments, "--json").stdout

    document = json.loads(shown)
    comm = document["comm"] if "comm" in document else document["connections"][0]["client"]["comm"]
    assert comm == "\x1b]0;pwned\x07[red]\n\\xff\u202e"
    assert shown.isascii()
    assert shown.rstrip("\n").isprintable()


def test_a_hostile_error_text_stays_one_line(peercred: Peercred, canned: CannedDaemon) -> None:
    canned.answer = failure(code_pb2.INVALID_ARGUMENT, "no\n\x1b[31m!", "INVALID_KEY", field="key")

    assert only_error(peercred(*LOOKUP)) == r"peercred: no\n\x1b[31m!"


# terminals and pipes


@pytest.mark.parametrize("arguments", [LOOKUP, ("list",), ("status",)])
def test_a_pipe_gets_plain_text_whatever_the_terminal(
    peercred: Peercred, arguments: tuple[str, ...]
) -> None:
    peercred.environment |= {"COLUMNS": "20", "FORCE_COLOR": "1"}

    shown = peercred(*arguments).stdout

    assert "\x1b" not in shown
    assert "…" not in shown
    assert not any(line != line.rstrip() for line in shown.splitlines())


def test_a_narrow_terminal_folds_and_loses_nothing(peercred: Peercred) -> None:
    wide = peercred.on_terminal("list", columns=200)
    narrow = peercred.on_terminal("list", columns=60)

    assert "\x1b[1m" in wide
    assert LONG_ENDPOINT in wide
    assert "…" not in narrow
    rows = [line for line in narrow.splitlines() if "\x1b" not in line]
    assert max(map(len, rows)) <= 60
    width = len(rows[0].split(" ")[0])
    assert "".join(row[:width] for row in rows).strip() == LONG_ENDPOINT


def test_no_colour_where_none_is_wanted(peercred: Peercred, canned: CannedDaemon) -> None:
    peercred.environment["NO_COLOR"] = "1"

    assert "\x1b[31m" not in peercred.on_terminal("status", columns=200)


def test_a_reader_that_leaves_ends_it_silently(peercred: Peercred, canned: CannedDaemon) -> None:
    canned.pages = [page(count=1000)]

    process = peercred.start("list", "--json")
    assert process.stdout
    process.stdout.close()
    with process:
        assert process.stderr
        stderr = process.stderr.read()

    assert (process.returncode, stderr) == (-signal.SIGPIPE, "")


def test_a_disk_that_is_full_is_an_error(peercred: Peercred) -> None:
    with open("/dev/full", "w") as full:
        done = peercred(*LOOKUP, "--json", output=full)

    assert done.returncode == os.EX_IOERR
    assert done.stderr == "peercred: the answer cannot be written: No space left on device\n"


def test_ctrl_c_ends_it_silently_by_its_signal(peercred: Peercred, canned: CannedDaemon) -> None:
    canned.release.clear()
    process = peercred.start(*LOOKUP)
    assert canned.waiting.wait(60)

    process.send_signal(signal.SIGINT)
    done = finish(process)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# exit codes


@pytest.mark.parametrize(
    ("code", "reason", "exit_code", "name"),
    [
        (code_pb2.NOT_FOUND, "NEVER_SEEN", 1, "not_found"),
        (code_pb2.NOT_FOUND, "OLDER_THAN_CAPTURE", 1, "not_found"),
        (code_pb2.NOT_FOUND, "TABLE_WAS_FULL", 1, "not_found"),
        (code_pb2.NOT_FOUND, "RETIRED", 1, "not_found"),
        (code_pb2.NOT_FOUND, "NOT_LOCAL", 1, "not_found"),
        (code_pb2.NOT_FOUND, "OF_A_LATER_VERSION", 1, "not_found"),
        (code_pb2.INVALID_ARGUMENT, "KEYS_DISAGREE", 2, "usage"),
        (code_pb2.UNAVAILABLE, "CAPTURE_LOST", 3, "unavailable"),
        (code_pb2.INTERNAL, "", 3, "unavailable"),
        (code_pb2.PERMISSION_DENIED, "", 4, "refused"),
    ],
)
def test_each_error_has_its_exit_code_and_its_document(
    peercred: Peercred,
    canned: CannedDaemon,
    code: int,
    reason: str,
    exit_code: int,
    name: str,
) -> None:
    canned.answer = failure(code, "what is wrong", reason, field="key")

    human, machine = peercred(*LOOKUP), peercred(*LOOKUP, "--json")

    assert human.returncode == machine.returncode == exit_code
    assert human.stderr == machine.stderr
    assert "what is wrong" in only_error(human)
    error = json.loads(machine.stdout)["error"]
    assert (error["code"], error["exit_code"]) == (name, exit_code)
    assert f"peercred: {error['message']}\n" == machine.stderr
    assert error.get("reason") == (reason if exit_code == 1 else None)


@pytest.mark.parametrize("arguments", [LOOKUP, ("list",), ("status",), ("whoami",)])
def test_without_a_daemon_the_exit_code_is_3_and_the_text_says_how_to_start_one(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = Peercred(f"unix:{tmp_path}/nobody.sock")(*arguments)

    assert done.returncode == 3
    assert "sudo peercredd" in only_error(done)


def test_a_daemon_that_does_not_answer_in_time_is_unavailable(
    peercred: Peercred, canned: CannedDaemon
) -> None:
    canned.release.clear()

    done = peercred(*LOOKUP, "--json", "--timeout", "0.2")

    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("", "has no port"),
        ("127.0.0.1", "has no port"),
        ("::1", "brackets"),
        ("[::1]", "has no port"),
        ("::1:80", "brackets"),
        ("[::1:80", "brackets"),
        ("::1]:80", "brackets"),
        ("[::1]80", "brackets"),
        ("[::1]:80:80", "brackets"),
        ("127.0.0.1:80:80", "brackets"),
        ("[]:80", "not an IPv6 address"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[::g]:80", "not an IPv6 address"),
        (":80", "not an IPv4 address"),
        ("localhost:80", "names are not looked up"),
        ("127.1:80", "not an IPv4 address"),
        ("127.0.0.01:80", "not an IPv4 address"),
        ("256.0.0.1:80", "not an IPv4 address"),
        (" 127.0.0.1:80", "not an IPv4 address"),
        ("127.0.0.1:", "not a port"),
        ("127.0.0.1:0", "not a port"),
        ("127.0.0.1:080", "not a port"),
        ("127.0.0.1:65536", "not a port"),
        ("127.0.0.1:-1", "not a port"),
        ("127.0.0.1:+80", "not a port"),
        ("127.0.0.1:8_0", "not a port"),
        ("127.0.0.1:80 ", "not a port"),
        ("127.0.0.1:80\n", "not a port"),
        ("127.0.0.1:٨٠", "not a port"),
        ("127.0.0.1:http", "not a port"),
        ("\x1b[31m:80", "not an IPv4 address"),
    ],
)
def test_an_endpoint_that_is_none_is_a_usage_error_that_shows_the_right_form(
    peercred: Peercred, canned: CannedDaemon, endpoint: str, complaint: str
) -> None:
    done = peercred("lookup", "127.0.0.1:1", endpoint)

    assert done.returncode == 2
    error = only_error(done)
    assert "'REMOTE'" in error
    assert complaint in error
    assert "; write " in error
    assert error.isprintable()
    assert not canned.keys


@pytest.mark.parametrize(
    "arguments",
    [
        ("lookup",),
        ("lookup", "127.0.0.1:1"),
        ("lookup", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"),
        ("lookup", "127.0.0.1:1", "[::1]:2"),
        ("lookup", "127.0.0.1:1", "127.0.0.1:2", "--cookie", "3"),
        ("lookup", "--cookie", "0"),
        ("lookup", "--cookie", "-1"),
        ("lookup", "--cookie", "0x10"),
        ("lookup", "--cookie", str(2**64)),
        ("lookup", "--cookie", "3", "--netns-cookie", "0"),
        ("list", "--uid", "no such user"),
        ("list", "--uid", "4294967295"),
        ("list", "--port", "0"),
        ("list", "--port", "http"),
        ("list", "surplus"),
        ("status", "--timeout", "0"),
        ("status", "--timeout", "nan"),
        ("status", "--timeout", "inf"),
        ("status", "--timeout", "soon"),
        ("status", "--address", "/run/peercredd.sock"),
        ("completion",),
        ("completion", "tcsh"),
        ("--no-such-option",),
        ("lokup",),
    ],
)
def test_a_usage_error_is_one_line_and_one_document(
    peercred: Peercred, arguments: tuple[str, ...]
) -> None:
    human, machine = peercred(*arguments), peercred(*arguments, "--json")

    assert human.returncode == machine.returncode == 2
    assert "\\n" not in only_error(human)
    assert json.loads(machine.stdout)["error"]["code"] == "usage"


def test_an_option_without_its_value_points_to_the_help_of_its_command(peercred: Peercred) -> None:
    assert only_error(peercred("lookup", "--cookie")).endswith("see `peercred lookup --help`")
    assert only_error(peercred("--address")).endswith("see `peercred --help`")


# options that every command takes


@pytest.mark.parametrize("arguments", [LOOKUP, ("list",), ("status",), ("whoami",)])
def test_common_options_may_stand_before_or_after_the_command(
    tmp_path: Path, canned: CannedDaemon, arguments: tuple[str, ...]
) -> None:
    options = ("--address", canned.address, "--timeout", "60", "--json")
    astray = Peercred(f"unix:{tmp_path}/nobody.sock")

    before, after = astray(*options, *arguments), astray(*arguments, *options)

    assert before.returncode == after.returncode == 0
    assert json.loads(before.stdout) == json.loads(after.stdout)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_the_help_of_every_command_teaches_by_examples(peercred: Peercred, command: str) -> None:
    done = peercred(command, "--help")

    assert done.returncode == 0
    _, examples = done.stdout.split("Examples:")
    assert f"peercred {command}" in examples
    assert all(option in done.stdout for option in ("--address", "--timeout", "--json"))


def test_the_help_lists_the_commands_and_the_exit_codes(peercred: Peercred) -> None:
    shown, alone = peercred("--help"), peercred()

    assert all(f"\n  {command} " in shown.stdout for command in SUBCOMMANDS)
    assert "Exit codes:" in shown.stdout
    assert (alone.returncode, alone.stderr) == (2, shown.stdout)


def test_the_help_of_lookup_says_that_a_cookie_stands_in_for_the_addresses(
    peercred: Peercred,
) -> None:
    usage = peercred("lookup", "--help").stdout.splitlines()[0]

    assert usage == "Usage: peercred lookup [OPTIONS] [LOCAL REMOTE | --cookie N]"


def test_the_version_is_that_of_the_installed_package(peercred: Peercred, tmp_path: Path) -> None:
    installed = tmp_path / "peercredd-9.8.7.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: peercredd\nVersion: 9.8.7\n")
    path = os.environ.get("PYTHONPATH")
    peercred.environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep + path if path else ''}"

    assert peercred("--version").stdout == "peercred 9.8.7\n"


# doctor


def examined(peercred: Peercred, canned: CannedDaemon) -> "subprocess.CompletedProcess[str]":
    """Let the doctor find a daemon with which nothing is wrong."""
    assert isinstance(canned.status, pb.GetStatusResponse)
    for attachment in canned.status.attachments:
        attachment.attached = True
    canned.release.clear()
    process = peercred.start("doctor", "--json")
    assert canned.waiting.wait(60)
    canned.answer = found(pid=process.pid, uid=os.geteuid(), gid=os.getegid())
    canned.release.set()
    return finish(process)


def test_doctor_is_content_when_all_is_well(
    peercred: Peercred, canned: CannedDaemon, host_check: Callable[[str], None]
) -> None:
    host_check(says("ok"))

    done = examined(peercred, canned)

    report = json.loads(done.stdout)
    assert report["ok"] is True, report
    assert done.returncode == 0
    assert [check["name"] for check in report["checks"]] == [
        "cgroup loadable",
        "daemon reachable",
        "hooks attached",
        "no runs missed",
        "SO_PEERCRED on TCP",
        "self-connection answered",
    ]
    assert {check["outcome"] for check in report["checks"]} == {"ok"}
    assert {check["mend"] for check in report["checks"]} == {""}


@pytest.mark.parametrize("outcome", ["failed", "unknown"])
def test_doctor_is_not_content_with_one_check_that_is_not_ok(
    peercred: Peercred,
    canned: CannedDaemon,
    host_check: Callable[[str], None],
    outcome: str,
) -> None:
    host_check(says(outcome))

    done = examined(peercred, canned)

    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    assert [check["outcome"] for check in report["checks"]] == [outcome, *["ok"] * 5]


def test_doctor_is_content_with_a_hook_set_that_is_not_needed(
    peercred: Peercred, canned: CannedDaemon, host_check: Callable[[str], None]
) -> None:
    host_check(says("unused", "trace loadable"))

    done = examined(peercred, canned)

    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    assert report["checks"][0]["outcome"] == "unused"


@pytest.mark.parametrize(
    ("canned_status", "said"),
    [
        (status(), "cgroup, 2 programs; trace unused: the kernel cannot attach to tcp_connect"),
        (traced(missed=0), "trace, 2 programs; cgroup unused: trace is preferred (--hooks auto)"),
    ],
)
def test_doctor_says_which_hook_set_runs_and_why_the_other_does_not(
    peercred: Peercred,
    canned: CannedDaemon,
    host_check: Callable[[str], None],
    canned_status: pb.GetStatusResponse,
    said: str,
) -> None:
    host_check(says("ok"))
    canned.status = canned_status

    checks = json.loads(examined(peercred, canned).stdout)["checks"]

    assert checks[2] == {"name": "hooks attached", "outcome": "ok", "detail": said, "mend": ""}


@pytest.mark.parametrize(
    ("canned_status", "said"),
    [(status(), "the kernel does not count such runs here"), (traced(missed=0), "none")],
)
def test_doctor_does_not_say_that_none_were_missed_where_nobody_counts(
    peercred: Peercred,
    canned: CannedDaemon,
    host_check: Callable[[str], None],
    canned_status: pb.GetStatusResponse,
    said: str,
) -> None:
    host_check(says("ok"))
    canned.status = canned_status

    checks = json.loads(examined(peercred, canned).stdout)["checks"]

    assert (checks[3]["outcome"], checks[3]["detail"]) == ("ok", said)


def test_doctor_warns_of_missed_runs_and_does_not_fail(
    peercred: Peercred, canned: CannedDaemon, host_check: Callable[[str], None]
) -> None:
    host_check(says("ok"))
    canned.status = traced(missed=7)

    done = examined(peercred, canned)

    report = json.loads(done.stdout)
    (warning,) = (check for check in report["checks"] if check["outcome"] != "ok")
    assert (done.returncode, report["ok"]) == (0, True)
    assert (warning["name"], warning["outcome"]) == ("no runs missed", "warning")
    assert "tcp_connect 7:" in warning["detail"]
    assert "inet_csk_accept" not in warning["detail"]
    assert "'not found'" in warning["detail"]
    assert 'capture.hooks = "cgroup"' in warning["mend"]


@pytest.mark.parametrize(
    ("count", "outcome", "detail", "mend"),
    [
        (2, "ok", "all, a.service (waited for)", ""),
        (3, "warning", "/x: another program is there", "ask its owner"),
    ],
)
def test_doctor_warns_where_so_peercred_on_tcp_is_asked_for_and_cannot_be(
    peercred: Peercred,
    canned: CannedDaemon,
    host_check: Callable[[str], None],
    count: int,
    outcome: str,
    detail: str,
    mend: str,
) -> None:
    host_check(says("ok"))
    assert isinstance(canned.status, pb.GetStatusResponse)
    canned.status.so_peercred.extend(OPTED_IN[:count])

    done = examined(peercred, canned)

    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    assert report["checks"][4] == {
        "name": "SO_PEERCRED on TCP",
        "outcome": outcome,
        "detail": detail,
        "mend": mend,
    }


def test_doctor_finds_lost_hooks_and_wrong_answers_and_says_what_mends_them(
    peercred: Peercred, host_check: Callable[[str], None]
) -> None:
    host_check(says("ok"))

    done = peercred("doctor", "--json")

    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert (done.returncode, report["ok"]) == (1, False)
    assert checks["cgroup loadable"]["outcome"] == "ok"
    assert checks["daemon reachable"]["outcome"] == "ok"
    assert checks["hooks attached"]["outcome"] == "failed"
    assert checks["hooks attached"]["detail"] == "not attached: sock_ops"
    assert checks["self-connection answered"]["outcome"] == "failed"
    assert "wrong: pid 4242" in checks["self-connection answered"]["detail"]
    assert all(check["mend"] for check in report["checks"] if check["outcome"] != "ok")


@pytest.mark.parametrize("need", ["BTF", "BCC importable"])
def test_doctor_tells_one_missing_thing_once(
    peercred: Peercred, host_check: Callable[[str], None], need: str
) -> None:
    checks = [
        {"name": name, "outcome": "failed", "detail": "no", "mend": "install it"}
        for name in (need, "trace loadable", "cgroup loadable")
    ]
    host_check(f"print({json.dumps(json.dumps({'checks': checks}))})")

    first, *loads = json.loads(peercred("doctor", "--json").stdout)["checks"][:3]

    assert (first["outcome"], first["mend"]) == ("failed", "install it")
    assert {(check["outcome"], check["mend"]) for check in loads} == {("unknown", f"see '{need}'")}


def test_doctor_shows_each_mend_below_its_check(
    peercred: Peercred, host_check: Callable[[str], None]
) -> None:
    host_check(says("ok", "a\x1bb"))

    done = peercred("doctor")

    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert lines[0] == ["ok", r"a\x1bb", "loaded"]
    assert lines[2][:3] == ["failed", "hooks", "attached"]
    assert lines[3][:2] == ["mend:", "restart"]


def test_doctor_cannot_tell_of_hooks_when_no_daemon_answers(
    tmp_path: Path, peercred: Peercred, host_check: Callable[[str], None]
) -> None:
    host_check(says("ok"))

    done = peercred("doctor", "--json", "--address", f"unix:{tmp_path}/nobody.sock")

    _, *checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 1
    assert [check["outcome"] for check in checks] == ["failed", *["unknown"] * 4]
    assert "sudo peercredd" in checks[0]["mend"]


@pytest.mark.parametrize(
    ("program", "outcome", "detail", "mend"),
    [
        ("import no_such_module", "failed", "No module named 'no_such_module'", "operations.md"),
        ("raise SystemExit('peercredd: a bad file')", "failed", "a bad file", "peercredd check"),
        ("raise SystemExit('peercredd: a; b: c')", "failed", "a", "b: c"),
        ("print('{')", "failed", "exit code 0", "peercredd check"),
        ("print('{\"checks\": 3}')", "failed", "exit code 0", "peercredd check"),
    ],
)
def test_doctor_survives_a_daemon_that_cannot_check_its_host(
    peercred: Peercred,
    host_check: Callable[[str], None],
    program: str,
    outcome: str,
    detail: str,
    mend: str,
) -> None:
    host_check(program)

    done = peercred("doctor", "--json")

    host = json.loads(done.stdout)["checks"][0]
    assert done.returncode == 1
    assert (host["name"], host["outcome"]) == ("host", outcome)
    assert detail in host["detail"]
    assert mend in host["mend"]


def test_doctor_runs_nothing_that_lies_in_the_current_directory(
    peercred: Peercred, host_check: Callable[[str], None], tmp_path: Path
) -> None:
    host_check(says("ok"))
    trap = tmp_path / "trap"
    (trap / "peercredd").mkdir(parents=True)
    (trap / "peercredd" / "__init__.py").touch()
    (trap / "peercredd" / "__main__.py").write_text("open('sprung', 'w')")
    (trap / "json.py").write_text("open('sprung', 'w')")

    script = "import sys; sys.argv[0] = 'peercred'; from peercred.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "doctor", "--json"],
        cwd=trap,
        env=peercred.environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert json.loads(done.stdout)["checks"][0]["detail"] == "loaded"
    assert not (trap / "sprung").exists()
