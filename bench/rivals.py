"""The ways to ask who is at the other end that need nothing installed in the kernel.

Each takes the two ends as the accepting socket has them (IPv4) and says what it
finds about the client's socket. All read the uid as the kernel reports it:
where it reports 0 for a socket without an owner, they say 0, as their users do.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.crowd import Address


class Answer(NamedTuple):
    """What a rival says of a client. It may know either of the two alone."""

    uid: int | None
    pid: int | None


Rival = Callable[[Address, Address], Answer | None]


def proc_scan(local: Address, remote: Address) -> Answer | None:
    """The row in /proc/net/tcp, then the process that holds its inode, as identd does."""
    row = proc_net_tcp_row(Path("/proc/net/tcp").read_bytes(), local, remote)
    if row is None:
        return None
    uid, inode = row
    return Answer(uid, _holder_of_inode(inode) if inode else None)


def proc_net_tcp_row(table: bytes, local: Address, remote: Address) -> tuple[int, int] | None:
    """The uid and inode in the client's row."""
    ends = f" {_proc_hex(remote)} {_proc_hex(local)} ".encode()
    start = table.find(ends)
    if start < 0:
        return None
    fields = table[start : table.index(b"\n", start)].split()
    return int(fields[6]), int(fields[8])


def _proc_hex(address: Address) -> str:
    (word,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{word:08X}:{address[1]:04X}"


def _holder_of_inode(inode: int) -> int | None:
    name = f"socket:[{inode}]"
    for process in os.scandir("/proc"):
        if not process.name.isdecimal():
            continue
        try:
            for descriptor in os.scandir(f"{process.path}/fd"):
                # Path.readlink() would handicap the rival.
                if os.readlink(descriptor.path) == name:  # noqa: PTH115
                    return int(process.name)
        except OSError:
            continue
    return None


def psutil_scan(local: Address, remote: Address) -> Answer | None:
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr == remote and connection.raddr == local:
            if connection.pid is None:
                return None
            return Answer(psutil.Process(connection.pid).uids().effective, connection.pid)
    return None


def ss(local: Address, remote: Address) -> Answer | None:
    command = ["ss", "-Htanpe", "src", "{}:{}".format(*remote), "dst", "{}:{}".format(*local)]
    return ss_answer(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def ss_answer(output: str) -> Answer | None:
    """What ss says of the one socket it was asked for."""
    uid = re.search(r"\buid:(\d+)", output)
    pid = re.search(r"\bpid=(\d+)", output)
    if uid is None and pid is None:
        return None
    # ss leaves "uid:" out where it is 0.
    return Answer(int(uid[1]) if uid else 0, int(pid[1]) if pid else None)


def lsof(local: Address, remote: Address) -> Answer | None:
    # Exit status 1 is "found nothing".
    command = ["lsof", "-nP", "-w", "-iTCP@{}:{}".format(*remote), "-Fpun"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return lsof_answer(output, local, remote)


def lsof_answer(output: str, local: Address, remote: Address) -> Answer | None:
    """What lsof's fields say of the client's socket."""
    wanted = "{}:{}->{}:{}".format(*remote, *local)
    process: dict[str, int] = {}
    for line in output.splitlines():
        match line[0], line[1:]:
            case "p" | "u" as field, value:
                process[field] = int(value)
            case "n", name if name == wanted:
                return Answer(process["u"], process["p"])
    return None


NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
# struct inet_diag_req_v2 with its struct inet_diag_sockid; any interface and cookie.
REQUEST = struct.Struct("=IHHII BBBxI 2s2s4s12x4s12xIII")
# The end of struct inet_diag_msg, behind its header and struct inet_diag_sockid.
OWNER = struct.Struct("=II")
OWNER_OFFSET = 16 + 4 + 48 + 12


def inet_diag(local: Address, remote: Address) -> Answer | None:
    """One exact request for the client's socket: no table is walked. Knows no pid."""
    request = REQUEST.pack(
        *(REQUEST.size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0),
        *(socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF),
        *(remote[1].to_bytes(2), local[1].to_bytes(2)),
        *(socket.inet_aton(remote[0]), socket.inet_aton(local[0])),
        *(0, 0xFFFFFFFF, 0xFFFFFFFF),
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(request)
        reply = netlink.recv(4096)
    (kind,) = struct.unpack_from("=H", reply, 4)
    if kind == NLMSG_ERROR:
        return None
    uid, _inode = OWNER.unpack_from(reply, OWNER_OFFSET)
    return Answer(uid, None)


RIVALS: dict[str, Rival] = {
    "/proc/net/tcp and /proc/*/fd": proc_scan,
    "psutil": psutil_scan,
    "ss": ss,
    "lsof": lsof,
    "inet_diag, exact": inet_diag,
}
