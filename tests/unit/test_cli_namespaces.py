from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harness.canned_daemon import CannedDaemon, found
from peercred import Namespaces
from peercred.cli.main import cli
from peercred.v1 import peer_credentials_pb2 as pb

OWN = Namespaces.own()


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[CannedDaemon]:
    with CannedDaemon(f"unix:{tmp_path}/peercredd.sock") as canned:
        canned.answer = answer(OWN)
        yield canned


def answer(namespaces: Namespaces, pid: int = 7) -> pb.LookupResponse:
    response = found()
    response.peer.pid = pid
    response.namespaces.pid_namespace = namespaces.pid or 0
    response.namespaces.user_namespace = namespaces.user or 0
    response.acceptor.CopyFrom(pb.Credentials(pid=1, uid=0, gid=0))
    return response


def lookup(canned: CannedDaemon, *arguments: str) -> Result:
    command = ["lookup", "--address", canned.address, "--cookie", "1", *arguments]
    return CliRunner().invoke(cli, command)


def rows(text: str) -> dict[str, str]:
    return {line[:18].rstrip(): line[18:].strip() for line in text.splitlines()}


def test_a_lookup_as_seen_by_a_process_names_its_namespaces(canned: CannedDaemon) -> None:
    assert lookup(canned, "--as-seen-by", str(os.getpid())).exit_code == 0
    assert lookup(canned).exit_code == 0
    assert canned.namespaces == [
        pb.Namespaces(pid_namespace=OWN.pid, user_namespace=OWN.user),
        pb.Namespaces(),
    ]


def test_it_shows_whose_numbers_they_are(canned: CannedDaemon) -> None:
    shown = rows(lookup(canned).stdout)
    document = json.loads(lookup(canned, "--json").stdout)

    assert shown["pids are those of"] == f"pid namespace {OWN.pid}"
    assert shown["ids are those of"] == f"user namespace {OWN.user}"
    assert document["namespaces"] == {"pid": OWN.pid, "user": OWN.user}


def test_a_process_that_is_not_visible_there_is_said_to_be_so(canned: CannedDaemon) -> None:
    canned.answer = answer(OWN, pid=0)

    assert rows(lookup(canned).stdout)["pid"] == "0 (not visible in that pid namespace)"
    assert json.loads(lookup(canned, "--json").stdout)["pid"] == 0


def test_ids_of_another_user_namespace_have_no_names_of_this_one(canned: CannedDaemon) -> None:
    assert rows(lookup(canned).stdout)["user"] == "0 (root)"
    canned.answer = answer(Namespaces(pid=OWN.pid, user=5))

    shown = rows(lookup(canned).stdout)
    document = json.loads(lookup(canned, "--json").stdout)

    assert (shown["user"], shown["group"]) == ("0", "0")
    assert shown["accepted by"] == "user 0, group 0"
    assert document["uid_name"] is document["gid_name"] is None
    assert document["acceptor"]["uid_name"] is None


@pytest.mark.parametrize("pid", ["0", "-1", "1_0", " 1", "self", "4194305", ""])
def test_what_is_no_process_is_a_usage_error(canned: CannedDaemon, pid: str) -> None:
    done = lookup(canned, "--as-seen-by", pid)

    assert done.exit_code == 2
    assert "is not a process id" in done.stderr
    assert not canned.namespaces


def test_a_process_that_has_ended_is_a_usage_error(canned: CannedDaemon) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()

    done = lookup(canned, "--as-seen-by", str(ended.pid))

    assert done.exit_code == 2
    assert f"there is no process {ended.pid}" in done.stderr
