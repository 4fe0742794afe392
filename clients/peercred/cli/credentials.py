"""Credentials for people (rows) and for programs (a document)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from peercred import Credentials, End, InvalidArgument, Namespaces, PeerCredentials
from peercred.cli.display import print_json, print_table
from peercred.cli.names import group_name, user_name

UNKNOWN = "unknown"

CAP_LAST_CAP = Path("/proc/sys/kernel/cap_last_cap")

ENDS = {
    End.CLIENT: "client (called connect)",
    End.SERVER: "server (called listen)",
}


def print_peer(peer: PeerCredentials, *, as_json: bool) -> None:
    """Print the answer to one lookup."""
    if as_json:
        print_json(document_of_peer(peer))
    else:
        print_table(list(_rows(peer, _has_this_hosts_names(peer.namespaces))))


def document_of_peer(peer: PeerCredentials) -> dict[str, object]:
    """`document` of the answer to one lookup, and of the acceptor in it."""
    named = _has_this_hosts_names(peer.namespaces)
    acceptor = document(peer.acceptor, named=named) if peer.acceptor else None
    return document(peer, named=named) | {"acceptor": acceptor}


def document(credentials: Credentials, *, named: bool = True) -> dict[str, object]:
    """Every field under its own name, unknown ones None; names of ids, if `named`, beside them."""
    fields = asdict(credentials)
    return {
        **{name: fields.pop(name) for name in ("pid", "uid", "gid")},
        "uid_name": user_name(credentials.uid) if named else None,
        "gid_name": group_name(credentials.gid) if named else None,
        **fields,
    }


def _has_this_hosts_names(namespaces: Namespaces) -> bool:
    """Whether the ids are those that names are looked up for here."""
    try:
        return namespaces.user == Namespaces.own().user
    except InvalidArgument:  # without /proc
        return False


def _rows(peer: PeerCredentials, named: bool) -> Iterator[tuple[str, str]]:
    yield "peer", ENDS[peer.peer_end]
    yield "answer rests on", f"the {peer.basis.value}"
    yield "command", UNKNOWN if peer.comm is None else peer.comm
    yield "pid", str(peer.pid) if peer.pid else "0 (not visible in that pid namespace)"
    yield "thread", _number(peer.tid)
    yield "user", _user(peer.uid, named)
    yield "group", _group(peer.gid, named)
    yield "real ids", _ids(peer.real_uid, peer.real_gid, named)
    yield "saved ids", _ids(peer.saved_uid, peer.saved_gid, named)
    yield "file system ids", _ids(peer.filesystem_uid, peer.filesystem_gid, named)
    yield "groups", _groups(peer, named)
    yield "capabilities", _capabilities(peer.effective_capabilities)
    yield "no new privileges", _yes_or_no(peer.no_new_privs)
    yield "login user", _user(peer.login_uid, named)
    yield "audit session", _number(peer.audit_session_id)
    yield "cgroup id", _number(peer.cgroup_id)
    yield "pid namespace", _number(peer.pid_namespace)
    yield "user namespace", _number(peer.user_namespace)
    yield "network namespace", f"{_number(peer.network_namespace)} (cookie {peer.netns_cookie})"
    yield "pids are those of", f"pid namespace {peer.namespaces.pid}"
    yield "ids are those of", f"user namespace {peer.namespaces.user}"
    yield "process started", _since_boot(peer.process_start_time_ns)
    yield "recorded", _since_boot(peer.time_ns)
    yield "established", _since_boot(peer.established_time_ns)
    yield "client socket", f"cookie {peer.client_socket_cookie}"
    yield "server socket", f"cookie {peer.server_socket_cookie}"
    yield from _acceptor_rows(peer.acceptor, named)


def _acceptor_rows(acceptor: Credentials | None, named: bool) -> Iterator[tuple[str, str]]:
    # Each row says whose it is: none can be taken for one of the answer.
    if acceptor is None:
        yield "accepted by", UNKNOWN
        return
    yield "accepted by", _ids(acceptor.uid, acceptor.gid, named)
    yield "acceptor's pid", str(acceptor.pid)
    yield "acceptor's command", UNKNOWN if acceptor.comm is None else acceptor.comm
    yield "accepted", _since_boot(acceptor.time_ns)


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _user(uid: int | None, named: bool) -> str:
    if uid is None or not named:
        return _number(uid)
    return f"{uid} ({user_name(uid) or 'no name'})"


def _group(gid: int | None, named: bool) -> str:
    if gid is None or not named:
        return _number(gid)
    return f"{gid} ({group_name(gid) or 'no name'})"


def _ids(uid: int | None, gid: int | None, named: bool) -> str:
    return f"user {_user(uid, named)}, group {_group(gid, named)}"


def _groups(peer: PeerCredentials, named: bool) -> str:
    if peer.group_count is None:
        return UNKNOWN
    shown = " ".join(_group(gid, named) for gid in peer.groups) or "none"
    return f"{shown} (first of {peer.group_count})" if peer.groups_truncated else shown


def _capabilities(capabilities: int | None) -> str:
    if capabilities is None:
        return UNKNOWN
    if not capabilities:
        return "none"
    with suppress(OSError):
        if capabilities == (1 << int(CAP_LAST_CAP.read_text()) + 1) - 1:
            return "all"
    # The form of CapEff in /proc/PID/status, which `capsh --decode` reads.
    return f"{capabilities:016x}"


def _yes_or_no(value: bool | None) -> str:
    return {None: UNKNOWN, True: "yes", False: "no"}[value]


def _since_boot(time_ns: int | None) -> str:
    if time_ns is None:
        return UNKNOWN
    boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    moment = datetime.fromtimestamp((boot_ns + time_ns) / 1e9).astimezone()
    return moment.isoformat(sep=" ", timespec="milliseconds")
