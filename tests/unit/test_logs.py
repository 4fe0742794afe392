import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys, structlog
from peercredd import journal, logs
journal.Journal.__init__.__defaults__ = (sys.argv[3],)
logs.configure(sys.argv[1], sys.argv[2])
log = structlog.get_logger("peercredd.test")
log.debug("detail")
log.info("serving", socket="/run/a b")
logging.getLogger("asyncio").debug("detail of a library")
logging.getLogger("asyncio").warning("slow %s", "callback")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
"""


def write_log(
    stderr: Path, level: str, form: str, *, journal: bool = False, to: str = "/nowhere"
) -> list[str]:
    with stderr.open("wb") as file:
        status = os.fstat(file.fileno())
        environment = {k: v for k, v in os.environ.items() if k != "JOURNAL_STREAM"}
        if journal:
            environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        else:
            # What a shell started from a unit inherits, with stderr sent elsewhere.
            environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino + 1}"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, level, form, to],
            env=environment,
            stderr=file,
            check=True,
        )
    return stderr.read_text().splitlines()


def test_a_file_gets_one_json_object_an_event(tmp_path: Path) -> None:
    events = [json.loads(line) for line in write_log(tmp_path / "log", "info", "auto")]

    assert [(event["level"], event["event"]) for event in events] == [
        ("info", "serving"),
        ("warning", "slow callback"),
        ("error", "broken"),
    ]
    assert events[0]["socket"] == "/run/a b"
    assert events[0]["timestamp"].endswith("Z")
    assert "ZeroDivisionError" in events[2]["exception"]
    assert all(list(event)[:3] == ["event", "level", "timestamp"] for event in events)


def test_stderr_of_a_unit_gets_a_priority_on_every_line_and_no_timestamp(tmp_path: Path) -> None:
    lines = write_log(tmp_path / "log", "info", "auto", journal=True)

    assert lines[:3] == ["<6>serving socket='/run/a b'", "<4>slow callback", "<3>broken"]
    assert lines[-1].endswith("ZeroDivisionError: division by zero")
    assert all(line.startswith("<3>") for line in lines[2:])


def fields(entry: bytes) -> dict[str, str]:
    """An entry of the journal, decoded as its protocol has it."""
    found = {}
    while entry:
        line, entry = entry.split(b"\n", 1)
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(entry[:8], "little")
            value, entry = entry[8 : 8 + size], entry[8 + size + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_the_journal_gets_an_entry_an_event_with_its_values_as_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        stderr = write_log(
            tmp_path / "log", "info", "auto", journal=True, to=str(tmp_path / "socket")
        )
        serving, slow, broken = (fields(journal.recv(65536)) for _ in range(3))

    assert stderr == []
    assert serving == {
        "MESSAGE": "serving socket='/run/a b'",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "peercredd",
        "PEERCREDD_SOCKET": "/run/a b",
    }
    assert (slow["MESSAGE"], slow["PRIORITY"]) == ("slow callback", "4")
    assert broken["PRIORITY"] == "3"
    assert broken["MESSAGE"].startswith("broken\n")
    assert broken["MESSAGE"].endswith("ZeroDivisionError: division by zero")


def test_the_journal_gets_json_when_asked(tmp_path: Path) -> None:
    lines = write_log(tmp_path / "log", "warning", "json", journal=True)

    assert [line[:3] for line in lines] == ["<4>", "<3>"]
    assert json.loads(lines[0][3:]) == {"event": "slow callback"}


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_written(tmp_path: Path, level: str, count: int) -> None:
    assert len(write_log(tmp_path / "log", level, "json")) == count


def test_text_in_a_file_has_no_colours(tmp_path: Path) -> None:
    line = write_log(tmp_path / "log", "info", "text")[0]

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z \[info *\] serving socket='/run/a b'", line)


HOSTILE = "a\n<2>2026-11-24T00:00:00Z [info     ] granted uid=0\x1b]0;x\x07\u202e\udcff\x9b31m"
HOSTILE_PROGRAM = """
import logging, sys, structlog
from peercredd import logs
logs.configure("info", "text")
log = structlog.get_logger("peercredd.test")
name = sys.stdin.read()
log.info("refused", comm=name)
log.info("refused", comm="\\x1b]0;x\\x07")
log.info("refused", **{name: 1})
log.info(name)
logging.getLogger("asyncio").warning("slow %s", name)
try:
    raise ValueError(name)
except ValueError:
    log.exception("broken")
"""


@pytest.mark.parametrize("journal", [False, True])
def test_nothing_that_strangers_choose_ends_a_line_or_begins_one_or_commands_a_terminal(
    tmp_path: Path, journal: bool
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        status = os.fstat(file.fileno())
        subprocess.run(
            [sys.executable, "-c", HOSTILE_PROGRAM],
            env=os.environ
            | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not journal)}"}
            | {"PYTHONIOENCODING": "utf-8:surrogatepass"},
            input=HOSTILE,
            stderr=file,
            encoding="utf-8",
            errors="surrogatepass",
            check=True,
        )
    lines = log.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines)
    events, rest = lines[:6], lines[6:]
    start = r"<[346]>" if journal else r"\d{4}-\d\d-\d\dT\S+Z \[\w+ *\] "
    assert all(re.match(start + r"\w", line) for line in events)
    # What belongs to an event is indented.
    assert all(re.match("<3>  " if journal else "  ", line) for line in rest)
    assert rest[-1].count(r"\x1b") == 1
