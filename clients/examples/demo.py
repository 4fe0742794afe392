"""peercredd at work: connections of several users, who are gone when the server asks.

``./dev demo`` runs it, as root. The daemon that it starts captures nothing but a
cgroup made here, and pins on a bpffs mounted here. Exit status 0 if every answer
was right and nothing is left behind, else 1.
"""

from __future__ import annotations

import os
import pwd
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

import peercred
from peercredd.mounts import CgroupError, cgroup_directory

NAME = f"peercredd-demo-{os.getpid()}"
USERS = ("root", os.environ.get("SUDO_USER", "root"), "daemon", "games", "nobody", "bin", "mail")
CLIENTS = 5
START_SECONDS = 60
STOP_SECONDS = 20
ACCEPT_SECONDS = 10

RESET = struct.pack("ii", 1, 0)
"""A struct linger that has close() send RST: not even a socket in FIN-WAIT-2 is left."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class Visitor(NamedTuple):
    """A connection whose client has exited."""

    user: pwd.struct_passwd
    pid: int
    accepted: socket.socket
    port: int


class Claim(NamedTuple):
    """What someone says of a connection's client."""

    text: str
    uid: int | None
    """None: it names nobody."""


def main() -> int:
    """Run the demo and return its exit status."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with (
            TemporaryDirectory(prefix=NAME) as folder,
            cgroup() as captured,
            daemon(Path(folder), captured) as address,
        ):
            right = show(address)
    except (DemoError, CgroupError, OSError, subprocess.CalledProcessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if captured.exists() or Path(folder).exists():
        print(f"demo: {captured} or {folder} is left behind", file=sys.stderr)
        return 1
    console.print("The daemon has stopped and nothing is left behind.", style="dim")
    return 0 if right else 1


@contextmanager
def cgroup() -> Iterator[Path]:
    """Make a cgroup and enter it; leave and remove it afterwards."""
    hierarchy = cgroup_directory("root")
    (own,) = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    path = hierarchy / NAME
    path.mkdir()
    try:
        (path / "cgroup.procs").write_text("0")
        yield path
    finally:
        (hierarchy / own / "cgroup.procs").write_text("0")
        path.rmdir()


@contextmanager
def daemon(folder: Path, captured: Path) -> Iterator[str]:
    """Run peercredd on `captured`, with all its files in `folder`; give its address."""
    bpffs, path, log = folder / "bpf", folder / "peercredd.sock", folder / "log"
    bpffs.mkdir()
    with ExitStack() as undo:
        notifications = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notifications.bind(str(folder / "notify"))
        # Pins on a file system of their own are gone with it, whatever happens.
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
        undo.callback(lambda: subprocess.run(["umount", bpffs], check=True))
        process = subprocess.Popen(
            [
                *(executable("peercredd"), "--config", "/dev/null", "--group", "root", "--no-tcp"),
                *("--cache-dir", folder / "cache"),
                *("--cgroup", captured, "--pin-dir", bpffs / "pins", "--socket", path),
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            stderr=undo.enter_context(log.open("wb")),
        )
        undo.callback(stop, process)
        if not ready(process, notifications):
            raise DemoError(f"peercredd did not start:\n{log.read_text()}")
        yield f"unix:{path}"


def ready(process: subprocess.Popen[bytes], notifications: socket.socket) -> bool:
    """Wait for sd_notify(3)'s READY=1; False if the daemon ends or takes too long."""
    ended = os.pidfd_open(process.pid)
    try:
        while True:
            readable, _, _ = select.select([notifications.fileno(), ended], [], [], START_SECONDS)
            if notifications.fileno() not in readable:
                return False
            if b"READY=1" in notifications.recv(4096).splitlines():
                return True
    finally:
        os.close(ended)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the daemon as an administrator would, or else by force."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def executable(name: str) -> Path:
    """Find a command that is installed beside this Python."""
    return Path(sys.executable).with_name(name)


def show(address: str) -> bool:
    """Have users connect and go, then tell who they were; True if all of it was right."""
    with ExitStack() as sockets:
        servers = [sockets.enter_context(server) for server in listen()]
        visitors = [
            visit(user, server, leave_by_reset=number == CLIENTS - 1)
            for number, (user, server) in enumerate(zip(users(), cycle(servers)))
        ]
        for visitor in visitors:
            sockets.enter_context(visitor.accepted)
        console.print(
            f"{len(visitors)} users have connected to a server on localhost, closed, and exited.\n"
            "Only now the server asks who they were.\n"
        )
        right = compare(visitors, address)
        return show_list(visitors, address) and right


def listen() -> list[socket.socket]:
    """Listen on one port of 127.0.0.1 and, if this host has it, of ::1."""
    servers = [socket.create_server(("127.0.0.1", 0))]
    _, port = servers[0].getsockname()
    with suppress(OSError):
        servers.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    for server in servers:
        server.settimeout(ACCEPT_SECONDS)
    return servers


def users() -> list[pwd.struct_passwd]:
    """Give some users of this host."""
    known = {user.pw_name: user for user in pwd.getpwall()}
    return [known[name] for name in dict.fromkeys(USERS) if name in known][:CLIENTS]


def visit(user: pwd.struct_passwd, server: socket.socket, *, leave_by_reset: bool) -> Visitor:
    """Have `user` connect and exit; only then accept."""
    pid = os.fork()
    if pid == 0:
        connect_as(user, server, leave_by_reset=leave_by_reset)
    if os.waitpid(pid, 0)[1] != 0:
        raise DemoError(f"the client of {user.pw_name} could not connect")
    accepted, (_, port, *_) = server.accept()
    return Visitor(user, pid, accepted, port)


def connect_as(user: pwd.struct_passwd, server: socket.socket, *, leave_by_reset: bool) -> NoReturn:
    """Connect, close and exit as `user`."""
    status = 1
    try:
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        with socket.socket(server.family) as client:
            client.connect(server.getsockname())
            if leave_by_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        status = 0
    finally:
        os._exit(status)


def compare(visitors: Sequence[Visitor], address: str) -> bool:
    """Print what everybody says of the visitors; True if peercredd is right about each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("CONNECTED", "PEERCREDD SAYS", "SS SAYS", "/PROC/NET/TCP SAYS"):
        table.add_column(header)
    named = {"peercredd": 0, "ss": 0, "/proc/net/tcp": 0}
    with peercred.Client(address) as client:
        for visitor in visitors:
            claims = dict(
                zip(
                    named,
                    (peercredd_says(client, visitor), ss_says(visitor), proc_says(visitor)),
                    strict=True,
                )
            )
            for name, claim in claims.items():
                named[name] += claim.uid == visitor.user.pw_uid
            table.add_row(
                f"{visitor.user.pw_name}, pid {visitor.pid}",
                *(coloured(claim, visitor) for claim in claims.values()),
            )
    with console.capture() as captured:
        console.print(table)
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n")
    counts = ", ".join(f"{name} {count}" for name, count in named.items())
    console.print(f"\nRight about the user, of {len(visitors)}: [bold]{counts}[/]")
    console.print(
        "(/proc/net/tcp says root of every closed socket, so it is right where the client "
        "was root.\nThe last client reset its connection: no socket is left.)",
        soft_wrap=True,
    )
    return named["peercredd"] == len(visitors)


def coloured(claim: Claim, visitor: Visitor) -> Text:
    """Paint a claim green if it is right, red if it is wrong."""
    if claim.uid is None:
        return Text(claim.text, "yellow")
    return Text(claim.text, "green" if claim.uid == visitor.user.pw_uid else "red")


def peercredd_says(client: peercred.Client, visitor: Visitor) -> Claim:
    """Ask peercredd, as a server would: with the accepted socket."""
    try:
        peer = client.lookup(visitor.accepted)
    except peercred.NotFound as error:
        return Claim(error.reason, None)
    text = f"{name(peer.uid)}, pid {peer.pid}"
    if (peer.pid, peer.gid) != (visitor.pid, visitor.user.pw_gid):
        return Claim(f"{text}: not that process", None)
    return Claim(text, peer.uid)


def ss_says(visitor: Visitor) -> Claim:
    """Ask ss(8) for the client's end."""
    _, server_port, *_ = visitor.accepted.getsockname()
    line = subprocess.run(
        [
            *("ss", "--no-header", "--tcp", "--numeric", "--extended", "--processes"),
            *("state", "all", f"sport = {visitor.port} and dport = {server_port}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not line:
        return Claim("no such socket", None)
    uid = re.search(r"\buid:(\d+)", line)
    return Claim(name(int(uid[1])), int(uid[1])) if uid else Claim("socket without owner", None)


def proc_says(visitor: Visitor) -> Claim:
    """Look for the client's end in /proc/net/tcp, proc_pid_net(5)."""
    _, server_port, *_ = visitor.accepted.getsockname()
    table = "tcp6" if visitor.accepted.family == socket.AF_INET6 else "tcp"
    for line in Path("/proc/net", table).read_text().splitlines()[1:]:
        _, local, remote, *_, uid = line.split()[:8]
        if local.endswith(f":{visitor.port:04X}") and remote.endswith(f":{server_port:04X}"):
            return Claim(f"{name(int(uid))}, uid {uid}", int(uid))
    return Claim("no such socket", None)


def name(uid: int) -> str:
    """Name a user as of now."""
    return pwd.getpwuid(uid).pw_name


def show_list(visitors: Sequence[Visitor], address: str) -> bool:
    """Print what ``peercred list`` says; True if it has every visitor."""
    console.print("\n$ peercred list", style="bold")
    listed = subprocess.run(
        [executable("peercred"), "list"],
        env={**os.environ, "PEERCRED_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    console.print(listed.stdout, markup=False, soft_wrap=True)
    words = [line.split() for line in listed.stdout.splitlines()]
    return all(
        any({visitor.user.pw_name, str(visitor.pid)} < set(line) for line in words)
        for visitor in visitors
    )


if __name__ == "__main__":
    sys.exit(main())
