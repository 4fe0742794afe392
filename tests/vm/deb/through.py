"""Whether connections are answered for that were there before, or were made during, a command.

`through.py COMMAND [ARGUMENT...]`, as root, with the interpreter of the installed package. Users
connect to a listener here and stay; more connect for as long as the command runs. When it has
ended, each accepted socket is looked up: once, all at once, and every answer has to be right.
"""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import peercred

USERS = (0, 1, 2, 65534, 1000)
HOSTS = ("127.0.0.1", "::1")
SECONDS_BETWEEN = 0.2
SECONDS_TO_CONNECT = 60

# What one user runs: each line is a port to connect to, and what has connected stays.
CONNECTS = """
import socket, sys
held = []
for line in sys.stdin:
    held.append(socket.create_connection(line.split()))
"""


class Held(NamedTuple):
    """An accepted socket, and who is at its other end."""

    accepted: socket.socket
    uid: int
    pid: int


class Users:
    """Processes of several users; each connects when it is told to."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self._listeners = [socket.create_server((host, 0), family=_family(host)) for host in HOSTS]
        for listener in self._listeners:
            listener.settimeout(SECONDS_TO_CONNECT)
        self._users = [
            subprocess.Popen(
                [sys.executable, "-c", CONNECTS],
                stdin=subprocess.PIPE,
                text=True,
                user=uid,
                group=uid,
                extra_groups=[],
            )
            for uid in USERS
        ]

    def connect(self) -> None:
        """Let the next user connect."""
        turn = len(self.held)
        user = self._users[turn % len(USERS)]
        listener = self._listeners[turn // len(USERS) % len(HOSTS)]
        host, port, *_ = listener.getsockname()
        assert user.stdin
        print(host, port, file=user.stdin, flush=True)
        accepted, _ = listener.accept()
        self.held.append(Held(accepted, USERS[turn % len(USERS)], user.pid))

    def connect_until(self, ended: threading.Event) -> None:
        """Let them connect, one after the other."""
        while not ended.wait(SECONDS_BETWEEN):
            self.connect()

    def end(self) -> None:
        """Let them go."""
        for user in self._users:
            user.communicate()


def wrong_answers(held: list[Held]) -> list[str]:
    """What is wrong with what the daemon says of these; a line for each."""
    with peercred.Client(timeout=60) as client:
        answers = client.lookup_many([each.accepted for each in held])
    wrong = []
    for number, (each, answer) in enumerate(zip(held, answers, strict=True)):
        if isinstance(answer, peercred.PeerCredError):
            wrong.append(f"connection {number} of uid {each.uid}: {answer}")
        elif (answer.uid, answer.pid) != (each.uid, each.pid):
            wrong.append(
                f"connection {number} of uid {each.uid}, pid {each.pid}: "
                f"uid {answer.uid}, pid {answer.pid}"
            )
        elif answer.basis is not peercred.Basis.SOCKET:
            wrong.append(f"connection {number}: the answer rests on {answer.basis}")
    return wrong


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def main(command: list[str]) -> int:
    """Run `command`, and say what became of the connections."""
    users = Users()
    for _ in range(len(USERS) * len(HOSTS)):
        users.connect()
    before = len(users.held)
    ended = threading.Event()
    connecting = threading.Thread(target=users.connect_until, args=(ended,))
    connecting.start()
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    ended.set()
    connecting.join()

    wrong = wrong_answers(users.held)
    users.end()
    meanwhile = len(users.held) - before
    print(f"{before} connections before, {meanwhile} meanwhile, {len(wrong)} answered wrongly")
    for line in wrong[:10]:
        print(line)
    if status:
        print(f"{command[0]} ended with {status}")
    return int(bool(status or wrong or not meanwhile))


if __name__ == "__main__":
    # An accepted socket for each connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(main(sys.argv[1:]))
