"""CPython's own tests of sockets notice nothing of us.

They are those of the distribution's interpreter, and take minutes: for machines with CPUs of
their own.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from harness import placed
from harness.cgroup import Cgroup
from harness.daemon import Daemon
from harness.patience import patient
from harness.requirements import cannot_run

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1200)]

SYSTEM_PYTHON = "/usr/bin/python3"
FEWEST_TESTS = {"test_socket": 500, "test_asyncio": 2000, "test_ssl": 100}
"""By suite; CPython 3.11 has 712, 2352 and 185."""
LEFT_OUT = "*VSOCK*"
"""Its sockets lead out of a virtual machine, and nothing need answer there: some tests wait."""
REPETITIONS = 5
SUITE_SECONDS = patient(1000)

# A network of its own: two runs at a time do not meet, and nothing else is met.
OWN_NETWORK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")

TELL_AND_EXECUTE = """
import os, socket, struct, sys
with (
    socket.create_server(("127.0.0.1", 0)) as listener,
    socket.create_connection(listener.getsockname()),
    listener.accept()[0] as accepted,
):
    peer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    print(struct.unpack_from("i", peer)[0] == os.getpid(), flush=True)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Whether a process there, connected to itself, is told so; then it becomes another program."""


class Pair(NamedTuple):
    """Outcomes by test, of two runs at the same time."""

    without: dict[str, str]
    captured: dict[str, str]


def run_both(suite: str, bare: Cgroup, captured: Cgroup, only: Iterable[str] = ()) -> Pair:
    """Run a suite, or some of its tests, in two cgroups; only the second knows its peers."""
    results = []
    with ExitStack() as stack:
        runs = []
        for cgroup in (bare, captured):
            # Not a pytest folder: its name is too long for the paths of AF_UNIX sockets.
            own = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            words = placed.command(
                cgroup,
                0,
                *(*OWN_NETWORK, SYSTEM_PYTHON, "-c", TELL_AND_EXECUTE),
                *(SYSTEM_PYTHON, "-m", "test", suite, "--tempdir", own, "--ignore", LEFT_OUT),
                *("--junit-xml", own / "junit.xml"),
                *(word for name in only for word in ("--match", name)),
            )
            runs.append((stack.enter_context(placed.running(words)), own, cgroup is captured))
        for process, own, is_captured in runs:
            said, _ = process.communicate(timeout=SUITE_SECONDS)
            assert said.startswith(f"{is_captured}\n"), said
            results.append(outcomes(own / "junit.xml", said))
    return Pair(*results)


def outcomes(junit: Path, said: str) -> dict[str, str]:
    """How each test ended: "passed", or what it is otherwise, with the reason of a skip."""
    assert junit.exists(), said
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        skipped = case.find("skipped")
        ended = [kind for kind in ("error", "failure") if case.find(kind) is not None]
        if skipped is not None:
            ended.append(f"skipped: {skipped.text}")
        found[case.attrib["name"]] = ", ".join(ended) or "passed"
    return found


@pytest.mark.parametrize("suite", FEWEST_TESTS)
def test_every_test_of_a_suite_of_cpython_ends_as_it_does_without_us(
    daemon: Daemon, cgroup: Cgroup, suite: str
) -> None:
    """A test that ends otherwise is repeated, for some depend on how busy the machine is.

    What it did with us it must not do again, unless it was seen to do that without us too.
    """
    found = subprocess.run([SYSTEM_PYTHON, "-c", f"import test.{suite}"], check=False)
    if found.returncode:
        cannot_run("the tests of /usr/bin/python3 are not there: ./dev test installs them")

    with Cgroup() as bare:
        first = run_both(suite, bare, cgroup)
        assert len(first.without) > FEWEST_TESTS[suite]
        assert first.captured.keys() == first.without.keys()
        doubtful = {name for name, end in first.captured.items() if first.without[name] != end}
        seen = {name: {first.without[name]} for name in doubtful}
        for _ in range(REPETITIONS if doubtful else 0):
            again = run_both(suite, bare, cgroup, doubtful)
            for name in doubtful:
                seen[name].add(again.without[name])
                assert again.captured[name] in seen[name], name
