"""What somebody who takes the server over has: /proc tells of the running one."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import peercred
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import CALL_SECONDS
from peercredd.libbpf import KernelError, Map
from peercredd.privileges import CAP_BPF

pytestmark = pytest.mark.kernel

NOBODY = 65534
PIDFD_GETFD = 438
"""The same on every architecture."""


def statuses(pid: int) -> Iterator[dict[str, str]]:
    """What proc_pid_status(5) says of each thread."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.fixture
def server(daemon: Daemon, client: peercred.Client) -> int:
    """The server's process, which has answered and so has all its threads."""
    client.lookup_many([(("127.0.0.1", 1), ("127.0.0.1", 2))] * 10)
    list(client.connections())
    return client.status().server_pid


def test_every_thread_of_the_server_is_a_users_without_any_privilege(
    daemon: Daemon, server: int
) -> None:
    # Before 5.19 the kernel may want CAP_BPF.
    kept = {0, 1 << CAP_BPF} if "CAP_BPF" in daemon.log() else {0}
    threads = list(statuses(server))
    assert len(threads) > 1
    for status in threads:
        assert set(status["Uid"].split()) == {str(NOBODY)}
        assert set(status["Gid"].split()) == {str(NOBODY)}
        assert status["Groups"].split() == []
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff")} <= kept
        assert {int(status[name], 16) for name in ("CapInh", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


def test_the_server_is_the_daemons_child_and_the_daemon_is_root(
    daemon: Daemon, client: peercred.Client, server: int
) -> None:
    told = client.status()

    assert told.daemon_pid == daemon.process.pid
    (ppid,) = {status["PPid"] for status in statuses(server)}
    assert int(ppid) == told.daemon_pid
    assert all(status["Uid"].split() == ["0"] * 4 for status in statuses(told.daemon_pid))


def test_no_process_of_the_same_user_may_look_into_the_server(server: int) -> None:
    # What is not dumpable is root's to ptrace(2).
    assert Path(f"/proc/{server}/environ").stat().st_uid == 0


def test_no_child_of_the_daemons_can_type_into_its_terminal(daemon: Daemon, server: int) -> None:
    # TIOCSTI is for those of the session that the terminal controls.
    assert os.getsid(server) == server
    assert os.getsid(daemon.process.pid) != server


@contextmanager
def descriptors(pid: int, of: str) -> Iterator[list[int]]:
    """Those of another process that are of a kind, as our own."""
    pidfd = os.pidfd_open(pid)
    found = []
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(link.readlink()) == f"anon_inode:{of}":
                    found.append(get_descriptor(pidfd, int(link.name)))
        yield found
    finally:
        for descriptor in (pidfd, *found):
            os.close(descriptor)


def get_descriptor(pidfd: int, descriptor: int) -> int:
    from peercredd import privileges

    got: int = privileges._libc.syscall(PIDFD_GETFD, pidfd, descriptor, 0)
    assert got >= 0, os.strerror(ctypes.get_errno())
    return got


def test_the_server_can_write_that_somebody_watches_and_nothing_else(server: int) -> None:
    writable = []
    with descriptors(server, "bpf-map") as maps:
        assert len(maps) >= 7
        for descriptor in maps:
            table = Map(descriptor)
            # A ring buffer has neither. Its reader writes in it how far it has read.
            if table.key_size == table.value_size == 0:
                continue
            refused: int | None = None
            try:
                table.update(bytes(table.key_size), bytes(table.value_size))
            except KernelError as error:
                refused = error.errno
            if refused != errno.EPERM:
                writable.append((table.value_size, table.max_entries, refused))

    assert writable == [(4, 1, None)]  # `watched` in bpf/maps.h, which stops no program


def test_nothing_of_the_daemons_is_open_in_the_server(daemon: Daemon, server: int) -> None:
    paths = set()
    for link in Path(f"/proc/{server}/fd").iterdir():
        with suppress(FileNotFoundError):
            paths.add(str(link.readlink()))
    assert not [path for path in paths if path.startswith(("/sys/fs", str(daemon.pin_dir)))]
    assert not [path for path in paths if path.endswith(".lock")]


def test_a_namespace_is_refused_rather_than_answered_while_the_supervisor_hangs(
    hook_set: str,
) -> None:
    with Cgroup() as cgroup, Daemon(cgroup, hook_set) as daemon:
        elsewhere = peercred.Namespaces(pid=1, user=2)
        with peercred.Client(daemon.address, timeout=CALL_SECONDS) as client:
            with pytest.raises(peercred.InvalidArgument):
                client.lookup_cookie(1, namespaces=elsewhere)
            daemon.process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(peercred.Unavailable, match="supervisor"):
                    client.lookup_cookie(1, namespaces=elsewhere)
                with pytest.raises(peercred.NotFound):
                    client.lookup_cookie(1)
            finally:
                daemon.process.send_signal(signal.SIGCONT)
            with pytest.raises(peercred.InvalidArgument):
                client.lookup_cookie(1, namespaces=elsewhere)
