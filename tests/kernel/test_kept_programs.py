"""A start is spared what an earlier one has compiled, and captures the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import steps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import Client, Daemon
from harness.routes import V4
from harness.stage import Stage
from harness.users import ALICE, SERVICE

pytestmark = pytest.mark.kernel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def started(cgroup: Cgroup, hook_set: str, folder: Path) -> Iterator[tuple[dict[str, Any], Client]]:
    """A daemon with its programs in a folder: what it said when it began to serve."""
    options = ("--cache-dir", str(folder), "--log-format", "json")
    with Daemon(cgroup, hook_set, *options) as daemon, daemon.client() as client:
        events = [json.loads(line) for line in daemon.log().splitlines()]
        yield next(each for each in events if each["event"] == "serving"), client


def assert_captures(origin: Origin, client: Client) -> None:
    with Stage(origin, client) as stage:
        server, alice = stage.actor(SERVICE), stage.actor(ALICE)
        listener = stage.listen(server, V4)
        stage.connect(alice, listener)
        assert stage.peer(server, server(steps.accept, listener.fds)).uid == ALICE


def test_the_second_start_does_not_compile_and_captures_the_same(
    cgroup: Cgroup, origin: Origin, hook_set: str, folder: Path
) -> None:
    for compiled in ("now", "before"):
        with started(cgroup, hook_set, folder) as (serving, client):
            assert serving["compiled"] == compiled
            assert_captures(origin, client)


def test_programs_that_were_damaged_are_compiled_anew(
    cgroup: Cgroup, origin: Origin, hook_set: str, folder: Path
) -> None:
    with started(cgroup, hook_set, folder):
        pass
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])

    with started(cgroup, hook_set, folder) as (serving, client):
        assert serving["compiled"] == "now"
        assert_captures(origin, client)
    assert kept.read_bytes() == whole


def test_programs_that_others_could_have_written_are_not_loaded_and_the_log_warns(
    cgroup: Cgroup, hook_set: str, folder: Path
) -> None:
    with started(cgroup, hook_set, folder):
        pass
    folder.chmod(0o777)

    options = ("--cache-dir", str(folder))
    with Daemon(cgroup, hook_set, *options) as daemon:
        assert "compiled programs are not kept" in daemon.log()
        assert f"{folder} can be written to by others" in daemon.log()
