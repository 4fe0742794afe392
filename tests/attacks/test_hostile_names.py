"""A process that calls itself something that a reader, a terminal or a program trips over."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import steps
from harness.actors import PYTHON, Actor
from harness.cgroup import Cgroup
from harness.cli import Peercred
from harness.daemon import Daemon
from harness.placed import command as placed
from harness.placed import running
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel

NAMES = {
    "newline": b"a\nuser  0 (root",
    "carriage return": b"a\rpid 1",
    "title of the window": b"\x1b]0;pwned\x07",
    "colour and clear": b"\x1b[31m\x1b[2J",
    "C1 in UTF-8": b"\xc2\x9b31m\xc2\x90",
    "C1 as a byte": b"\x9b31m",
    "not UTF-8": b"\xff\xfe\xc0\x80\xed\xa0\x80",
    "cut in a letter": "aaaaaaaaaaaaa\u20ac".encode()[:15],
    "right to left": "\u202euser\u2066".encode(),
    "wide": "\u8868\u8868\u8868\u8868\u8868".encode(),
    "a pile of accents": b"a" + "\u0301".encode() * 7,
    "not to be seen": "\u3164\u2800\u115f\u200b".encode(),
    "spaces": b"   ",
    "nothing": b"",
    "markup of rich": b"[red]x[/red]",
    "quotes": b"\"',}]\\",
    "a format": b"%s%n{0}$(id)",
    "unknown": b"unknown",
}


WORST = ("newline", "title of the window", "not UTF-8")


@dataclass(frozen=True)
class Party:
    """A server, and a client of each name."""

    server: Actor
    port: int
    accepted: dict[bytes, int]

    def ends(self, name: bytes) -> tuple[str, str]:
        """The tuple of a client, as the command line takes it."""
        (local, remote) = self.server(steps.names, self.accepted[name])
        return f"{local[0]}:{local[1]}", f"{remote[0]}:{remote[1]}"


@pytest.fixture
def party(stage: Stage) -> Party:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, V4)
    accepted = {}
    for name in NAMES.values():
        client(steps.set_comm, name)
        stage.connect(client, listener)
        accepted[name] = server(steps.accept, listener.fds).tcp
    return Party(server, listener.addresses.tcp[1], accepted)


def told(name: bytes) -> str:
    """As the library tells it."""
    return name.decode("utf-8", "backslashreplace")


def test_the_library_tells_a_name_as_text_whose_repr_is_one_printable_line(
    stage: Stage, party: Party
) -> None:
    for name, accepted in party.accepted.items():
        answer = stage.answer(party.server, accepted)
        assert (answer.comm, answer.uid) == (told(name), ALICE)
        assert repr(answer).isprintable()
    listed = list(stage.client.connections(server_port=party.port))
    assert {each.client.comm for each in listed} == set(map(told, NAMES.values()))
    assert all(repr(each).isprintable() for each in listed)


def lines_of(peercred: Peercred, on_terminal: bool, *arguments: str) -> list[str]:
    if not on_terminal:
        text = peercred(*arguments).stdout
    else:
        text = peercred.on_terminal(*arguments, columns=250).replace("\r\n", "\n")
        # Our own styles are all that a terminal may obey.
        text = text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    lines = text.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    return lines


@pytest.mark.parametrize("on_terminal", [False, True], ids=["pipe", "terminal"])
def test_no_list_shows_a_name_that_is_more_than_a_name(
    daemon: Daemon, party: Party, on_terminal: bool
) -> None:
    rows = lines_of(Peercred(daemon.address), on_terminal, "list", "--port", str(party.port))
    assert len(rows) == 1 + len(NAMES)
    assert {row.split()[2] for row in rows[1:]} == {str(ALICE)}


@pytest.mark.parametrize("on_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("name", WORST)
def test_no_answer_shows_a_name_that_is_more_than_a_name(
    daemon: Daemon, party: Party, name: str, on_terminal: bool
) -> None:
    ends = party.ends(NAMES[name])
    rows = lines_of(Peercred(daemon.address), on_terminal, "lookup", *ends)
    (user,) = [row for row in rows if re.match(r"user  ", row)]
    assert user.split()[1] == str(ALICE)


def test_json_has_each_name_exactly_and_in_ascii(daemon: Daemon, party: Party) -> None:
    peercred = Peercred(daemon.address)

    def document(*arguments: str) -> Any:
        (line,) = peercred(*arguments, "--json").stdout.splitlines()
        assert line.isascii()
        assert line.isprintable()
        return json.loads(line)

    listed = document("list", "--port", str(party.port))["connections"]
    assert {each["client"]["comm"] for each in listed} == set(map(told, NAMES.values()))
    for name in WORST:
        found = document("lookup", *party.ends(NAMES[name]))
        assert (found["comm"], found["uid"]) == (told(NAMES[name]), ALICE)


@pytest.mark.parametrize("form", ["--lines", "--json"])
def test_no_event_of_a_watch_shows_a_name_that_is_more_than_a_name(
    daemon: Daemon, party: Party, form: str
) -> None:
    watch = Peercred(daemon.address).start("watch", form, "--port", str(party.port))
    with watch:
        assert watch.stdout
        lines = list(itertools.takewhile(lambda line: "synchronized" not in line, watch.stdout))
        watch.send_signal(signal.SIGINT)

    assert len(lines) == len(NAMES)
    assert all(line.removesuffix("\n").isprintable() for line in lines)
    if form == "--json":
        assert all(map(str.isascii, lines))
        comms = [json.loads(line)["connection"]["client"]["comm"] for line in lines]
        assert set(comms) == set(map(told, NAMES.values()))
    else:
        assert all(re.match(r"\S+ \S+ present \S+ -> \S+ \S+ pid \d+ \(", each) for each in lines)


def test_the_live_view_of_a_watch_obeys_no_name(daemon: Daemon, party: Party) -> None:
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 60, 250, 0, 0))
    with Peercred(daemon.address).start("watch", "--port", str(party.port), output=inside) as watch:
        os.close(inside)
        shown = ""
        while f"{len(NAMES)} connections, 0 established" not in shown or shown[-1] == "\x1b":
            shown += os.read(outside, 65536).decode()
        watch.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: the other end is closed
            while part := os.read(outside, 65536):
                shown += part.decode()
    os.close(outside)

    # What rich draws with: no cursor, back to the first line, bold, dim.
    rest = re.sub(r"\x1b\[(\?25[lh]|2K|\d*A|[012]?m)|\r", "", shown)
    assert all(line.isprintable() for line in rest.split("\n"))
    last = shown.rpartition("connections, 0 established")[2]
    assert len(re.findall(rf" {ALICE} +\d+ ", last)) == len(NAMES)


def test_the_daemons_log_is_not_written_by_names(daemon: Daemon, party: Party) -> None:
    before = daemon.log()
    peercred = Peercred(daemon.address)
    for arguments in (("list",), ("lookup", *party.ends(NAMES["newline"])), ("doctor",)):
        peercred(*arguments)
    for line in daemon.log().removeprefix(before).splitlines():
        json.loads(line)
        assert line.isascii()


@pytest.mark.parametrize("command", [("whoami",), ("whoami", "--json"), ("doctor",)], ids=" ".join)
def test_a_program_file_of_any_name_is_told_about_itself_in_printable_lines(
    cgroup: Cgroup, daemon: Daemon, tmp_path: Path, command: tuple[str, ...]
) -> None:
    program = tmp_path / os.fsdecode(b"\n\x1b]0;x\x07\xff\xe2\x80\xae")
    program.symlink_to(PYTHON)
    environment = f"PYTHONPATH={':'.join(sys.path)}"
    words = [
        "env",
        environment,
        str(program),
        "-m",
        "peercred.cli.main",
        "--address",
        daemon.address,
        *command,
    ]
    with running(placed(cgroup, 0, *words)) as run:
        assert run.stdout
        text = run.stdout.read()
    lines = text.removesuffix("\n").split("\n")
    assert lines
    assert all(line.isprintable() and line.isascii() for line in lines)
    assert (r"\x1b]0;x\x07" in text or "\\u001b]0;x\\u0007" in text) == (command[0] == "whoami")
