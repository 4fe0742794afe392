"""What a process without privileges still has, tried in processes of its own."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pty
import pwd
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peercredd import privileges
from peercredd.privileges import CAP_BPF, PrivilegeError, User

NOBODY = User("nobody", 65534, 65534)


def in_child(work: Callable[[], None]) -> None:
    """Do it in an interpreter of its own; raises AssertionError with what went wrong there.

    `work` is a function of this module. In a fork of the tests' process, with the threads and locks
    that gRPC left there, it crashed now and then, and hung.
    """
    program = f"import {work.__module__} as tests; tests.{work.__qualname__}()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def status(task: str) -> dict[str, str]:
    lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def with_second_thread(work: Callable[[str], None]) -> None:
    """Call with the number of a thread that is there meanwhile."""
    ready, done = threading.Event(), threading.Event()
    numbers: list[int] = []

    def wait() -> None:
        numbers.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    ready.wait()
    work(str(numbers[0]))
    done.set()
    thread.join()


def lose_all_beside(other: str) -> None:
    privileges.become(NOBODY)
    for task in (str(os.getpid()), other):
        found = status(task)
        assert {*found["Uid"].split(), *found["Gid"].split()} == {"65534"}, found
        assert found["Groups"].split() == []
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[name], 16) == 0, (task, name)
        assert found["NoNewPrivs"] == "1"


def lose_all() -> None:
    privileges.forgo()
    with_second_thread(lose_all_beside)


@pytest.mark.root
def test_threads_that_were_there_lose_all_that_the_first_one_loses() -> None:
    in_child(lose_all)


def keep_cap_bpf_beside(other: str) -> None:
    privileges.become(NOBODY, keep_bpf=True)
    own = status(str(os.getpid()))
    assert [int(own[name], 16) for name in ("CapPrm", "CapEff")] == [1 << CAP_BPF] * 2
    assert int(own["CapInh"], 16) == int(own["CapAmb"], 16) == 0
    assert int(status(other)["CapPrm"], 16) == 0


def keep_cap_bpf() -> None:
    with_second_thread(keep_cap_bpf_beside)


@pytest.mark.root
def test_where_cap_bpf_stays_one_thread_has_it_and_nothing_else() -> None:
    in_child(keep_cap_bpf)


def try_to_become_root() -> None:
    privileges.forgo()
    privileges.become(NOBODY)
    with pytest.raises(PermissionError):
        os.setresuid(0, 0, 0)


@pytest.mark.root
def test_there_is_no_way_back_to_root() -> None:
    in_child(try_to_become_root)


@pytest.mark.root
def test_whether_something_works_without_privileges_is_tried() -> None:
    assert privileges.works_without(lambda: None)
    assert not privileges.works_without(lambda: Path("/proc/1/ns/pid").stat())


@pytest.mark.root
def test_a_missing_user_is_nobody_and_never_root() -> None:
    with capture_logs() as logs:
        found = privileges.user("no-such-user-anywhere")

    assert found.uid == pwd.getpwnam("nobody").pw_uid
    assert [entry["log_level"] for entry in logs] == ["warning"]
    with pytest.raises(PrivilegeError, match=r"api\.user: root"):
        privileges.user("root")


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno == errno.ENOSYS
    return False


def try_what_the_filter_leaves() -> None:
    listener, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
    privileges.forgo()
    running: list[str] = []
    with_second_thread(running.append)
    assert privileges.filter_system_calls() is None
    with_second_thread(running.append)
    assert len(running) == 2
    assert refused(lambda: client.connect(listener.getsockname()))
    assert Path("/proc/self/status").read_text().count("Seccomp:\t2") == 1
    assert refused(os.fork)
    assert refused(lambda: os.execv("/bin/true", ["true"]))
    assert refused(lambda: os.kill(os.getppid(), 0))
    assert refused(lambda: os.mkdir("/tmp/never"))  # noqa: PTH102
    assert refused(lambda: bpf(BPF_LINK_DETACH))
    assert refused(lambda: bpf(BPF_MAP_DELETE_ELEM))
    assert not refused(lambda: bpf(BPF_MAP_LOOKUP_ELEM))


def test_the_filter_leaves_what_the_server_does_and_no_more() -> None:
    in_child(try_what_the_filter_leaves)


def try_to_reach_somebody() -> None:
    os.setsid()
    _, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    unconnected, stream = socket.socket(), socket.socket()
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    privileges.forgo()
    assert privileges.filter_system_calls() is None

    assert refused(lambda: fcntl.ioctl(terminal, termios.TIOCSTI, b"#"))
    assert refused(lambda: fcntl.fcntl(listener, fcntl.F_SETOWN, os.getppid()))
    assert refused(lambda: unconnected.sendto(b"x", socket.MSG_FASTOPEN, address))
    assert refused(lambda: stream.sendmsg([b"x"], [], socket.MSG_FASTOPEN, address))
    assert refused(lambda: datagram.sendto(b"x", address))
    # Over one it could hand on the links that it holds, to somebody without a filter.
    assert refused(lambda: socket.socket(socket.AF_UNIX))
    assert refused(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    assert refused(lambda: unconnected.listen())
    # What service._is_local does.
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::1", 0))


def test_through_the_filter_nobody_is_called_typed_for_or_given_anything() -> None:
    in_child(try_to_reach_somebody)


BPF_MAP_LOOKUP_ELEM = 1
BPF_MAP_DELETE_ELEM = 3
BPF_LINK_DETACH = 34


def bpf(command: int) -> None:
    number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    if privileges._libc.syscall(number, command, None, 0):
        raise OSError(ctypes.get_errno(), "bpf")


def test_what_the_library_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seccomp", None)

    assert "python3-seccomp" in (privileges.filter_system_calls() or "")


def ask_whose_child_it_is() -> None:
    assert privileges.die_with(os.getppid())
    assert not privileges.die_with(os.getppid() + 1)


def test_who_has_another_parent_by_then_is_told() -> None:
    in_child(ask_whose_child_it_is)


def test_the_supervisor_needs_no_grpc() -> None:
    loaded = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, peercredd.daemon; print('grpc' in sys.modules or 'google' in sys.modules)",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert loaded.stdout == "False\n"
